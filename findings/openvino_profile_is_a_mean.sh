#!/usr/bin/env bash
# openvino 2026.4.1: a request's profiling information is the mean over all requests before it
#
# With PERF_COUNT, InferRequest.get_profiling_info() tells what each node took. That is not of this
# request: it is the mean over every run of the compiled model so far, the first cold ones and
# those of other InferRequests included, in whole microseconds. execTimeMcs of the runtime model
# is the same number.
#
# Expected: the times of the last request, as the method belongs to a request; or a way to start
# counting anew.
#
# Why it matters: a warm-up does not help, sizes that change between calls are mixed, and one
# disturbance stays in all that is read later. Compile the model anew for each size, read the
# counts after the warm-up too and take these off (count x mean), and compile several times.
#
# Seen (one thread; the times differ from machine to machine, the order does not):
#
#     after 3 requests of 2048 rows: large
#     after a request of 1 row: large
#     after a request of 1 row in another InferRequest: large
#     of 1 row in a model compiled anew: small
set -euo pipefail

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work"
export OMP_NUM_THREADS=1

python3 -m venv venv
venv/bin/python -m pip install -q --disable-pip-version-check \
    openvino==2026.4.1 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }

venv/bin/python - <<'PY' | tee seen.txt
import os

os.environ.update(CI="true", HOME=os.getcwd())  # openvino's telemetry: off, and no file of it

import numpy as np
import openvino as ov
from openvino import opset13 as operators

x = operators.parameter([-1, 1024], np.float32, name="x")
weight = np.random.default_rng(0).standard_normal((1024, 1024)).astype(np.float32)
product = operators.matmul(x, operators.constant(weight), False, False)
product.set_friendly_name("product")
model = ov.Model([product], [x], "model")


def compiled():
    return ov.Core().compile_model(model, "CPU", {"PERF_COUNT": True, "INFERENCE_NUM_THREADS": 1})


def microseconds(request):
    told = {node.node_name: node.real_time for node in request.get_profiling_info()}
    return 1e6 * told["product"].total_seconds()


many, one = np.ones((2048, 1024), np.float32), np.ones((1, 1024), np.float32)
alone = compiled().create_infer_request()
for _ in range(3):
    alone.infer({0: one})
least = microseconds(alone)


def say(when, request):
    print(f"{when}: {'large' if microseconds(request) > 20 * least else 'small'}")


network = compiled()
first, second = network.create_infer_request(), network.create_infer_request()
for _ in range(3):
    first.infer({0: many})
say("after 3 requests of 2048 rows", first)
first.infer({0: one})
say("after a request of 1 row", first)
second.infer({0: one})
say("after a request of 1 row in another InferRequest", second)
say("of 1 row in a model compiled anew", alone)
PY

diff seen.txt - <<'EOF'
after 3 requests of 2048 rows: large
after a request of 1 row: large
after a request of 1 row in another InferRequest: large
of 1 row in a model compiled anew: small
EOF
