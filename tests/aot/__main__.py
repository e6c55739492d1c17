import json
import os
import re
import sys
import tempfile
from pathlib import Path

sys.path[0] = str(Path(__file__).parent.parent)  # not this folder: its files are modules of the package

from aot import all_cases  # noqa: E402
from aot.compiler import compile_case  # noqa: E402

if __name__ == "__main__":
    if len(sys.argv) != 2 or not re.fullmatch(r"[89]\d|1[0-2]\d", sys.argv[1]):
        sys.exit("usage: python tests/aot ARCHITECTURE, as 90 for compute capability 9.0; 80 at least")
    architecture = int(sys.argv[1])
    os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"
    with tempfile.TemporaryDirectory() as folder:  # a kernel that comes from a cache has no ptxas log
        os.environ["TRITON_CACHE_DIR"] = folder
        for case in all_cases(architecture):
            print(json.dumps(compile_case(case, architecture)), flush=True)
