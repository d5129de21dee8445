import gzip
import json
import sys
from collections import Counter
from pathlib import Path

trace, report = (Path(name).read_bytes() for name in sys.argv[1:])
lines = [json.loads(line) for line in gzip.decompress(trace).splitlines()]
rows = [json.loads(line) for line in report.splitlines()]
wanted = Counter(line["identity"] for line in lines)
sys.exit(0 if {r["identity"]: r["count"] for r in rows} == wanted else "they differ")
