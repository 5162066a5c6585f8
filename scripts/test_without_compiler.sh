#!/usr/bin/env bash
# Builds a wheel as on a machine that has no compiler (the backend then fetches the package ziglang),
# installs it beside the packages of .venv, and runs the tests of the C kernels against that copy. Then the
# whole engine generates text, with the kernels just built and, once they are deleted, with plain torch: both
# must say what transformers says.
# Everything happens in a temporary folder; .venv and the tree are left alone.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
python=$root/.venv/bin/python
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

mkdir -p "$work/source" "$work/run" "$work/nothing"
cp -r octavo _build pyproject.toml README.md LICENSE NOTICE "$work/source/"
[ -e setup.py ] && cp setup.py "$work/source/"
find "$work/source" \( -name '*.so' -o -name '*.dylib' -o -name '__pycache__' \) -prune -exec rm -rf {} +
cp -r tests pyproject.toml "$work/run/"

# An empty folder as PATH: no cc, gcc, clang, nor anything else. CC would name one as well.
hidden=(env -u CC PATH="$work/nothing")
installed=("${hidden[@]}" PYTHONPATH="$work/site" "$python")
tests=("${installed[@]}" -m pytest -q -m "not slow" -p no:cacheprovider)
"${hidden[@]}" "$python" -m pip wheel --no-deps --wheel-dir "$work/wheels" "$work/source"
"$python" -m pip install --no-deps --target "$work/site" "$work"/wheels/octavo-*.whl

cd "$work/run"
"${installed[@]}" - "$work/site" <<'EOF'
import sys
from pathlib import Path

import octavo
from octavo import LLM, SamplingParams  # the lazy ones too

site = Path(sys.argv[1])
assert Path(octavo.__file__).is_relative_to(site), octavo.__file__
libraries = [path.name for path in (site / "octavo" / "kernels" / "cpu").glob("liboctavo_cpu.*")]
assert libraries, "the wheel holds no compiled kernels"
print("built without a compiler:", *libraries)
EOF
"${tests[@]}" tests/kernels/cpu

text=(tests/parity/test_engine.py tests/parity/test_smollm2.py -k "together or all-at-once or briefly")
"${tests[@]}" "${text[@]}"

rm "$work"/site/octavo/kernels/cpu/liboctavo_cpu.*
"${installed[@]}" - <<'EOF'
import torch

from octavo.kernels.cpu.choose import choose

for dtype in (torch.float32, torch.bfloat16):
    choice = choose(dtype)
    assert choice.name == "torch", choice
print("without the kernels:", choice.reason)
EOF
"${tests[@]}" "${text[@]}"
