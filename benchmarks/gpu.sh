#!/usr/bin/env bash
# What is to be tested and measured on a machine with a GPU, in calls of nine minutes:
#
#   benchmarks/gpu.sh FOLDER smoke tests kernels profile
#   benchmarks/gpu.sh FOLDER peers sanitizer network train
#
#   benchmarks/gpu.sh FOLDER [PART...]             all parts, unless some are named
#   benchmarks/gpu.sh --dry-run FOLDER [PART...]   the same commands on the CPU, small: no figure of it means anything
#   benchmarks/gpu.sh --pack FOLDER                beforehand: wheels of this tree and of packages that may be missing there
#
# Parts: smoke (every operator beside the CPU), tests (pytest on cuda), kernels (ours, beside a copy), profile (Nsight
# Compute on three kernels), peers (kernels and loss beside other libraries), sanitizer (compute-sanitizer), network
# (embedding, training step), train (small models, and sampling from them); they are done in this order, the most needed first.
#
# All that is found comes back in one archive, FOLDER/gpu-PART.tar.gz of the first part, whose summary.txt says what passed:
# it is written again every few seconds, so that a call that is stopped loses nothing. A failed build ends the call. A step
# has its own limit; a call ends within KLFLOW_LIMIT seconds (540).
#
# PYTHON: the Python to use (python3). KLFLOW_WHEELS: the folder of --pack (.wheels): its library saves the build there.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
py=${PYTHON:-python3}
limit=${KLFLOW_LIMIT:-540}
wheels=${KLFLOW_WHEELS:-$root/.wheels}
mode=gpu device=cuda
case ${1:-} in --dry-run) mode=dry device=cpu; shift ;; --pack) mode=pack; shift ;; esac
folder=${1:?FOLDER, which takes the results, is missing}
shift
all=(smoke tests kernels profile peers sanitizer network train)
parts=("${@:-${all[@]}}")
for part in "${parts[@]}"; do
  [[ " ${all[*]} " == *" $part "* ]] || { echo "part: got $part, allowed is one of ${all[*]}"; exit 2; }
done
folder=$(mkdir -p "$folder" && cd "$folder" && pwd) || exit 2
sources() { find csrc klflow_ext setup.py -type f -not -name '*.so' -not -name '*.pyc' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum; }

if [ $mode = pack ]; then
  # For a PYTHON of the same minor version as there; TORCH_CUDA_ARCH_LIST=9.0 builds for one card. quack (92 MB with the CUTLASS
  # DSL) and FlashInfer (101 MB) are left out: they are measured where they are installed. Two wheels of one package would
  # stop the installation: what is there already is not fetched again.
  fetch="$py -m pip download -q --no-deps --only-binary=:all: -d $folder"
  for name in tyro docstring-parser typeguard liger-kernel cut-cross-entropy; do
    ls "$folder/${name//-/_}"-*.whl >/dev/null 2>&1 || $fetch $name || echo "not packed: $name"
  done
  rm -f "$folder"/klflow_ext-*.whl
  $py -m pip wheel -q --no-build-isolation --no-deps -w "$folder" . && sources >"$folder/sources" || exit 1
  du -ch "$folder"/*
  exit
fi

# ---- results: in $work, packed into one archive

work=$(mktemp -d) child='' failed=0
pack() {
  local new=$folder/.gpu.$BASHPID
  tar czf "$new" -C "$work/results" . 2>/dev/null || [ $? -eq 1 ] || return  # 1: a file grew while it was read
  mv -f "$new" "$folder/gpu-${parts[0]}.tar.gz"
}
finish() {
  trap '' TERM INT HUP
  [ -z "$child" ] || kill "$child" 2>/dev/null
  kill "$packer" 2>/dev/null
  wait 2>/dev/null
  rm -f "$folder"/.gpu.*
  pack
  rm -rf "$work"
}
out=$work/results site=$work/site
mkdir "$out" "$site"
export PYTHONPATH="$site:$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
(while sleep 5 && kill -0 $$; do pack; done) >/dev/null 2>&1 &  # ends with this script, however that ends
packer=$!
trap finish EXIT
trap 'say "stopped"; exit 143' TERM INT HUP
say() { echo "$*" | tee -a "$out/summary.txt"; }

# step NAME SECONDS COMMAND...: its output goes to NAME.log.
step() {
  local name=$1 most=$2 start=$SECONDS code
  shift 2
  ((most = limit - start < most ? limit - start : most))
  if ((most < 1)); then say "skipped $name: no time left"; failed=1; return 1; fi
  timeout -k 5 "$most" "$@" >"$out/$name.log" 2>&1 &
  child=$!
  wait $child
  code=$?
  child=''
  case $code in
    0) say "ok      $name  $((SECONDS - start)) s" ;;
    124 | 137) say "STOPPED $name  after $most s: $(tail -n 1 "$out/$name.log")" ;;
    *) say "FAILED  $name  $((SECONDS - start)) s: $(tail -n 1 "$out/$name.log")" ;;
  esac
  ((code == 0)) || failed=1
  return $code
}
# Options of the dry run, or of the GPU: sizes DRY GPU, each one word list.
sizes() { if [ $mode = dry ]; then echo "$1"; else echo "$2"; fi; }
wants() { [[ " ${parts[*]} " == *" $1 "* ]]; }

# ---- the library

{
  date -u; git log -1 --oneline; $py -VV; nvidia-smi; nvcc --version
  $py -m pip list 2>/dev/null | grep -iE '^(torch|triton|numpy|pytest|liger|cut.cross|quack|flashinfer|tyro|tokenizers) '
} >"$out/machine.log" 2>&1
if [ $mode = gpu ]; then
  $py -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null || { say "FAILED  torch of $py sees no CUDA device"; exit 1; }
fi
loads="import klflow_ext; i = klflow_ext.build_info(); print(i); assert '$device' == 'cpu' or i['cuda_stream']"
install="$py -m pip install -q --no-deps --no-compile --target $site"
if compgen -G "$wheels/*.whl" >/dev/null; then
  step wheels 60 $install --no-index "$wheels"/*.whl
  [ "$(cat "$wheels/sources" 2>/dev/null)" = "$(sources)" ] || rm -rf "$site"/klflow_ext*  # of another tree
fi
if [ $mode = dry ]; then
  step library 60 $py -c "$loads"
elif [ -d "$site/klflow_ext" ] && step library 60 $py -c "$loads"; then
  say "the library is the packed one"
else
  rm -rf "$site"/klflow_ext*
  export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$($py -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')}
  step build 240 $install --no-build-isolation . && step library 60 $py -c "$loads"
fi || { say "nothing is measured without the library"; exit 1; }
step info 60 $py -m klflow_ext info

# ---- the parts

on="--device $device"
wide=$(sizes "--shapes 5x400" "--shapes 4096x50259,4096x128256")
if wants smoke; then
  step smoke 90 $py benchmarks/smoke.py $on $(sizes "--shapes 3x31" "")
fi
if wants tests; then
  step tests 240 $py -m pytest -n $(sizes 2 8) --dist worksteal --maxfail 20 -rf python_tests/ops \
    $(sizes "python_tests/ops/test_interpolate.py" "python_tests/path python_tests/sample") \
    -k "$(sizes "cpu and 21-2" "cuda")"
fi
if wants kernels; then
  step kernels 150 $py benchmarks/kernels.py $on --no-peers --json "$out/cuda.json" \
    $(sizes "--shapes 5x400 --seconds 0.01" "--seconds 0.1")
fi
if wants profile; then
  for op in noise_interpolate cross_entropy_grad topk_sample; do
    kernel=${op%_grad}_kernel profiler="ncu --set full --clock-control none --kernel-name regex:$kernel --launch-skip 1 --launch-count 1"
    [ $mode = gpu ] || profiler=''
    if [ -n "$profiler" ] && ! command -v ncu >/dev/null; then say "skipped profile: there is no ncu"; break; fi
    step "profile_$op" 60 $profiler $py benchmarks/kernels.py $on --no-peers --seconds 0 --dtypes bfloat16 --ops $op \
      ${wide%,*}
  done
fi
if wants peers; then
  step peers 200 $py benchmarks/kernels.py $on $wide --json "$out/cuda_peers.json" --plot "$out/cuda_peers.png" \
    $(sizes "--ops cross_entropy --dtypes float32 --seconds 0.01" "--dtypes bfloat16 --seconds 0.3")
  step linear 100 $py benchmarks/linear_cross_entropy.py $on --json "$out/cuda_linear_cross_entropy.json" \
    $(sizes "--shapes 9x301x16 --dtypes float32 --seconds 0.1" \
      "--shapes 8192x50259x768,8192x128256x4096 --dtypes bfloat16 --seconds 4")
fi
if wants sanitizer; then
  # The caching allocator would give out blocks of 2 MB, in which a step beyond a tensor is no error.
  for tool in memcheck racecheck initcheck; do
    sanitizer="compute-sanitizer --tool $tool --error-exitcode 1"
    [ $mode = gpu ] || sanitizer=''
    if [ -n "$sanitizer" ] && ! command -v compute-sanitizer >/dev/null; then say "skipped sanitizer: there is none"; break; fi
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$tool" 120 $sanitizer $py benchmarks/smoke.py $on --dtypes bfloat16 \
      --shapes $(sizes 3x31 3x31,9x2503)
  done
fi
if wants network; then
  step embedding 60 $py benchmarks/embedding.py $on --json "$out/cuda_embedding.json" \
    $(sizes "--rows 4 --vocab 600 --width 8 --seconds 0.1" "--rows 8192 --width 768 --dtypes bfloat16 --seconds 5")
  step train_step 100 $py benchmarks/train_step.py $on --json "$out/cuda_train_step.json" --plot "$out/cuda_train_step.png" \
    $(sizes "--vocab 64 --batch 1 --length 8 --width 64 --layers 1 --seconds 0.1 --steps posterior" \
      "--batch 64 --dtype bfloat16 --seconds 6")
fi
if wants train; then
  size="$on $(sizes "--batch-size 2 --length 16 --n-layer 1 --n-head 1 --n-embd 16 --vocab-size 300 --steps 2" \
    "--batch-size 256 --length 64 --dtype bfloat16")"
  step fit 150 $py -m klflow_ext train --out "$work/fit" $size $(sizes "" "--steps 1000000 --seconds 60") &&
    for method in sampling slices; do
      step $method 60 $py benchmarks/sampling.py "$work/fit" $on --method $method --json "$out/cuda_$method.json" \
        $(sizes "--batches 1 --length 4 --steps 2 --calls 1 --dtypes float32" "")
    done
  [ $mode = dry ] || step fit_compiled 120 $py -m klflow_ext train --out "$work/fit_compiled" $size --steps 1000000 --seconds 40 --compile
  for run in fit fit_compiled; do cp "$work/$run/log.jsonl" "$out/$run.jsonl" 2>/dev/null; done
fi
exit $failed
