#!/bin/sh
# All kernels on this machine's GPU: needs a Python with torch and Triton, nothing installed of ours, no network.
# PYTHON=... chooses the Python; options go to benchmarks/gpu/run.py (--out, --only, --minutes).
cd "$(dirname "$0")/.." || exit 2
PYTHONPATH=$PWD exec "${PYTHON:-python3}" -m benchmarks.gpu.run "$@"
