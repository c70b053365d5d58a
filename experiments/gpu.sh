#!/bin/sh
# The benchmark on a CUDA GPU: experiments/gpu.sh [TEXT [arguments of bench_gpu.py]]. The text is
# what data/shakespeare_char is made of where it is missing; "" for none.
set -e
text=${1:+$(realpath "$1")}
[ $# -eq 0 ] || shift
cd "$(dirname "$0")/.."
python=$(command -v python3 || command -v python)
if [ -n "$text" ] && [ ! -e data/shakespeare_char/meta.json ]; then
    "$python" prepare_shakespeare.py --input_file="$text" --dataset=shakespeare_char
fi
exec "$python" experiments/bench_gpu.py "$@"
