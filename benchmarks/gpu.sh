#!/usr/bin/env bash
# One command on a machine with a GPU: build, test on cuda, compute-sanitizer on small shapes, benchmark. Results go to
# the folder named by the first argument (default: benchmarks/results).
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:-benchmarks/results}" && cd "${1:-benchmarks/results}" && pwd)
failed=0
step() {
  local name=$1 start=$SECONDS
  shift
  if "$@" >"$out/$name.log" 2>&1; then echo "ok      $name  $((SECONDS - start)) s"; else echo "FAILED  $name  $((SECONDS - start)) s (see $out/$name.log)"; failed=1; fi
}
python -c 'import torch; assert torch.cuda.is_available(), "this torch sees no CUDA device"' || exit 1
step build python -m pip install --no-build-isolation --no-deps --force-reinstall .
step info python -m klflow_ext info
step tests python -m pytest python_tests/test_ops.py python_tests/test_noise.py python_tests/test_embedding.py \
  python_tests/test_linear.py -k cuda
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck initcheck; do
    step "$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 python -m pytest python_tests/test_ops.py \
      python_tests/test_embedding.py -k "cuda and (9-31 or 77-7 or 9-2500) and not opcheck and not compile" -x
  done
else
  echo "skipped compute-sanitizer: not installed"
fi
step benchmark python benchmarks/kernels.py --device cuda --seconds 0.3 --json "$out/cuda.json" --plot "$out/cuda.png"
step embedding python benchmarks/embedding.py --rows 8192 --dtypes bfloat16,float32 --json "$out/cuda_embedding.json"
step linear python benchmarks/linear_cross_entropy.py --dtypes bfloat16 --json "$out/cuda_linear_cross_entropy.json"
step train python benchmarks/train_step.py --batch 64 --dtype bfloat16 --seconds 10 --json "$out/cuda_train_step.json"
step memory python benchmarks/train_step.py --batch 64 --dtype bfloat16 --memory --json "$out/cuda_train_step.json" \
  --plot "$out/cuda_train_step.png"
cat "$out"/{benchmark,embedding,linear,train,memory}.log
exit $failed
