#!/usr/bin/env bash
# matplotlib 3.11.2: savefig to a .pdf on a full disk raises AttributeError instead of OSError
#
# The OSError of the first write that fails is replaced while the file is closed: the stream that was
# being written has its length but not its position. So it is with plots of some thousand bytes; a
# nearly empty one, and the other formats, let the OSError out. Here no file may become larger than
# 100 bytes, which is what a full disk looks like to a writer.
#
# Expected: OSError ("File too large", or "No space left on device"), as from savefig to .svg or .png.
#
# Why it matters: a program that catches OSError around savefig ends with a traceback that says nothing
# of the disk. Drawing into io.BytesIO and writing its bytes avoids it.
#
# Seen (x86-64 Linux, Python 3.11):
#
#     png: OSError: [Errno 27] File too large
#     svg: OSError: [Errno 27] File too large
#     pdf: AttributeError: 'Stream' object has no attribute 'pos'
set -euo pipefail

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work"

python3 -m venv venv
venv/bin/python -m pip install -q --disable-pip-version-check matplotlib==3.11.2 2>pip.log || { cat pip.log >&2; exit 1; }

venv/bin/python -W ignore - <<'PY'
import resource

from matplotlib.figure import Figure

figure = Figure()
figure.add_subplot().plot(range(2000), [i * 7919 % 1000 for i in range(2000)])
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
seen = {}
for ending in ("png", "svg", "pdf"):
    figure.savefig(f"warm.{ending}")  # fonts and caches are found before
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        figure.savefig(f"plot.{ending}")
    except Exception as error:
        seen[ending] = error
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    print(f"{ending}: {type(seen[ending]).__name__}: {seen[ending]}")
assert isinstance(seen["png"], OSError) and isinstance(seen["svg"], OSError)
assert isinstance(seen["pdf"], AttributeError), "changed: the error of the system comes out"
PY
