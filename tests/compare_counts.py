import gzip, json, sys
from collections import Counter
from pathlib import Path  # noqa: E401, E702, I001

trace, report = (Path(name).read_bytes() for name in sys.argv[1:])
wanted = Counter(
    json.loads(line)["identity"] for line in gzip.decompress(trace).splitlines()
)
found = {row["identity"]: row["count"] for row in map(json.loads, report.splitlines())}
sys.exit(0 if found == wanted else "the counts differ")
