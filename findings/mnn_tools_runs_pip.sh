#!/usr/bin/env bash
# `import MNN.tools` calls pip (MNN 3.6.1)
#
# The package's __init__ imports the Python side of its converter, which imports a logger, which runs
# os.system("pip install -U aliyun-log-python-sdk") where that is missing. It is the pip that stands
# first on PATH, whatever environment that belongs to. With the package there, each conversion by the
# command `mnnconvert` then sends its options, the sizes of the files and an identifier of the machine
# to the vendor. Below, the pip on PATH is a script that writes down what it is asked for and fails,
# so nothing is installed and nothing is sent.
#
# Expected: importing a module to install nothing, least of all in another environment; to be asked
# before use is reported.
#
# Why it matters: who converts pruned networks in a build or on a machine with a frozen environment
# changes it by an import. The converter itself is in the top-level module `_tools` and needs none of
# that.
#
# Seen (x86-64 Linux, Python 3.11):
#
#     import _tools: converts (True), pip called 0 times
#     import MNN.tools: pip called with: install -U aliyun-log-python-sdk
set -euo pipefail

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work"
export OMP_NUM_THREADS=1

python3 -m venv venv
venv/bin/python -m pip install -q --disable-pip-version-check \
    MNN==3.6.1 numpy==2.4.6 onnx==1.23.2 2>pip.log || { cat pip.log >&2; exit 1; }

mkdir bin
cat > bin/pip <<'SH'
#!/bin/sh
echo "$@" >> "$CALLS"
exit 1
SH
chmod +x bin/pip
export CALLS="$work/calls" PATH="$work/bin:$PATH"

cat > convert.py <<'PY'
import os

import _tools
import onnx
from onnx import helper

value = [helper.make_tensor_value_info(name, 1, [1, 4]) for name in "xy"]
graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", value[:1], value[1:])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
onnx.save(model, "net.onnx")
options = "-f ONNX --modelFile net.onnx --MNNModel net.mnn --bizCode finding"
_tools.mnnconvert(["mnnconvert", *options.split()])
raise SystemExit(0 if os.path.exists("net.mnn") else 1)
PY

converts=False
venv/bin/python convert.py >log 2>&1 && converts=True
calls=0
[ ! -e calls ] || calls="$(wc -l < calls)"
echo "import _tools: converts ($converts), pip called $calls times"
[ "$converts" = True ] || { cat log >&2; echo "changed: _tools does not convert" >&2; exit 1; }
[ "$calls" = 0 ] || { echo "changed: _tools calls pip" >&2; exit 1; }

venv/bin/python -c 'import MNN.tools' >log 2>&1 || { cat log >&2; exit 1; }
[ -e calls ] || { echo "changed: import MNN.tools calls no pip" >&2; exit 1; }
echo "import MNN.tools: pip called with: $(sort -u calls)"
grep -q '^install -U aliyun-log-python-sdk$' calls || { echo "changed: another call" >&2; exit 1; }
