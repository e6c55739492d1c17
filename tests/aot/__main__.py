import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parent.parent)  # not this folder: its files are modules of the package

from aot import all_cases  # noqa: E402
from aot.compiler import compile_case  # noqa: E402

if __name__ == "__main__":
    architecture = int(sys.argv[1])
    for case in all_cases(architecture):
        print(json.dumps(compile_case(case, architecture)), flush=True)
