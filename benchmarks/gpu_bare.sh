#!/usr/bin/env bash
# Runs the doctor and benchmarks/gpu.py on a bare GPU machine without a network:
#
#   benchmarks/gpu_bare.sh build/gpu-bundle.tar.xz OUTPUT_DIR [SECONDS [ARGUMENTS of gpu.py]]
#
# `python -m tools.gpu_bundle` makes the archive elsewhere. SECONDS is the limit of everything together (600). PYTHON
# names the interpreter with torch (python3). OUTPUT_DIR gets doctor.log, gpu.log, gpu.json and logs.tar.xz.
# Without a GPU, for a dry run: ... 1800 --device cpu --small
set -u
bundle=$(realpath "$1")
output=$(realpath "$2")
limit=${3:-600}
shift $(($# < 3 ? $# : 3))
python=${PYTHON:-python3}
platform=cuda
case " $* " in *" --device cpu "*) platform=cpu ;; esac

cd "$(dirname "$0")/.." || exit
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$output"
tar -xJf "$bundle" -C "$scratch" || exit
export PYTHONPATH=$scratch/site:$PWD PYTHONUNBUFFERED=1

echo "doctor, after $SECONDS s"
timeout --signal=INT --kill-after=5 150 "$python" recipes/doctor.py "platform=$platform" "work_dir=$scratch/doctor" \
  2>&1 | tee "$output/doctor.log"
doctor=${PIPESTATUS[0]}

# Something is left for ending the last measurement and for packing the logs.
left=$((limit - SECONDS - 20))
echo "benchmark, after $SECONDS s, with $left s left"
timeout --signal=INT --kill-after=5 $((left + 10)) "$python" benchmarks/gpu.py --seconds "$left" \
  --trl-path "$scratch/trl" --work-dir "$scratch/work" --output "$output/gpu.json" "$@" 2>&1 | tee "$output/gpu.log"
benchmark=${PIPESTATUS[0]}

(cd "$scratch" && find doctor work -name '*.log' -o -name '*.case.json' | tar -cJf "$output/logs.tar.xz" -T -)
echo "done after $SECONDS s: doctor $doctor, benchmark $benchmark"
exit $((doctor || benchmark))
