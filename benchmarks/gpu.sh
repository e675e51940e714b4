#!/usr/bin/env bash
# What a GPU can show, and a part of the tests, in less than ten minutes on a bare machine without a network.
#   bash benchmarks/gpu.sh                           results go to benchmarks/results/, or to $OUT
#   TINY=1 OUT=rehearsal bash benchmarks/gpu.sh      the same commands on a CPU, with models of two narrow blocks
#   DRY=1 bash benchmarks/gpu.sh                     print the commands
# Wheels of packages that are missing are taken from wheels/ (or $WHEELS). PYTHON is the Python to use, SECONDS_IN_ALL
# the time that there is: what does not fit into it is not begun, and what has been measured until then is kept.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
wheels=${WHEELS:-$PWD/wheels}
out=${OUT:-benchmarks/results}
all=${SECONDS_IN_ALL:-570}
tiny=${TINY:-}
platform=${tiny:+cpu}
platform=${platform:-gpu}
failed=()
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$scratch/programs}
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.6} # PyTorch needs some of it, too
if [ -n "$tiny" ]; then
  export JAX_PLATFORMS=cpu JAX_DISABLE_MOST_OPTIMIZATIONS=1 # a rehearsal compiles sooner
fi

# step NAME LIMIT COMMAND...: at most LIMIT seconds, or what is left of all; a rehearsal may take all that is left.
step() {
  local name=$1 limit=$2 left=$((all - SECONDS))
  shift 2
  if [ -n "$tiny" ]; then limit=$left; fi
  if [ -n "${DRY:-}" ]; then
    echo "$*"
    return
  fi
  if [ "$left" -lt 15 ]; then
    echo "== $name: not run, no time is left"
    failed+=("$name")
    return
  fi
  echo "== $name, after $SECONDS s"
  timeout --kill-after=5 "$((limit < left ? limit : left))" "$@" || failed+=("$name")
}

# bench NAME LIMIT WORDS...: one benchmark; a rehearsal has --tiny and takes the words behind "--" instead.
bench() {
  local name=$1 limit=$2 words=() rehearsed=() behind=
  shift 2
  for word in "$@"; do
    if [ "$word" = -- ]; then behind=1; elif [ -n "$behind" ]; then rehearsed+=("$word"); else words+=("$word"); fi
  done
  if [ -n "$tiny" ]; then words=(--tiny "${rehearsed[@]}"); fi
  step "$name ${words[*]}" "$limit" "$python" -m "benchmarks.$name" "${words[@]}" --out "$out/${name}_$platform.json"
}

if [ -z "${DRY:-}" ] && compgen -G "$wheels/*.whl" > /dev/null; then
  "$python" -m pip install --quiet --no-index --no-deps --target "$scratch/packages" "$wheels"/*.whl
  export PYTHONPATH=$PYTHONPATH:$scratch/packages
fi
bench inference 110 --models deit_base --batch 256 --dtypes bfloat16 --pruned nvit_b nvit_b_odd nvit_t \
  -- --pruned nvit_b --batch 2 --rounds 1 --against eager
bench training 110 --models deit_base --batch 128 --dtype bfloat16 \
  --steps pretrain finetune prune "prune, taylor collected" "score fisher" "score taylor" \
  -- --steps pretrain finetune prune "prune, taylor collected" --batch 4 --rounds 1 --against "PyTorch eager"
bench scores 90 --model deit_base --images 2048 --batch 64 --ours fisher "fisher, remat" \
  -- --images 8 --batch 4 --ours fisher
bench inference 70 --models deit_base --batch 256 --dtypes bfloat16 --predict 0.54 \
  -- --predict 0.6 --batch 2 --rounds 1
bench scores 40 --model deit_base --images 64 --batch 32 --ours gradient "hvp, 1 probe" "hvp, 3 probes" --theirs \
  -- --images 8 --batch 4 --ours gradient "hvp, 1 probe" "hvp, 3 probes" --theirs
bench inference 50 --models deit_tiny deit_small --batch 256 --dtypes bfloat16 --against fused compile \
  -- --pruned --batch 2 --rounds 1 --against fused
bench attention 40 --heads 12 --batch 256 --dtype bfloat16 -- --widths 16x8 --rounds 1
bench memory 80 --model deit_base --batch 128 --stages pretrain finetune "score fisher" --widths dense \
  -- --batch 4 --dtype float32 --stages pretrain "score fisher" --widths dense
bench waiting 60 --configs demo deit_base --words "import jax" help --rounds 1 \
  -- --configs deit_tiny --words help --rounds 1
bench memory 40 --model deit_base --batch 128 --stages pretrain --widths ragged \
  -- --batch 4 --dtype float32 --stages pretrain --widths ragged
bench inference 40 --models deit_base --batch 1 8 32 --dtypes bfloat16 --pruned nvit_b --against fused \
  -- --pruned --batch 2 --rounds 1 --against
tests=(tests/latency tests/pruning/test_saliency.py tests/training)
if [ -n "$tiny" ]; then tests=(tests/benchmarks/test_timing.py); fi
# Tests compare float32 products with exact ones; a GPU rounds them to TF32 unless it is told not to.
step tests 90 env JAX_DEFAULT_MATMUL_PRECISION=highest "$python" -m pytest -q -p no:cacheprovider \
  -o addopts=--strict-markers -m "not slow and not fault" "${tests[@]}"
if [ -n "${DRY:-}" ]; then exit 0; fi
echo "== $SECONDS s; not whole: ${#failed[@]}"
for name in ${failed[@]+"${failed[@]}"}; do echo "   $name"; done
[ ${#failed[@]} -eq 0 ]
