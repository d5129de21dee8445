import gzip
import json
import sys
from collections import Counter

trace, report = sys.argv[1:]
wanted = Counter(
    json.loads(line)["identity"] for line in gzip.open(trace, "rt", encoding="utf-8")
)
found = {
    row["identity"]: row["count"]
    for row in map(json.loads, open(report, encoding="utf-8"))
}
sys.exit(
    0
    if found == wanted
    else f"{len(found)} and {len(wanted)} identities, differing: "
    + str([i for i in {**wanted, **found} if found.get(i) != wanted.get(i)][:5])
)
