#!/usr/bin/env bash
# What cannot be measured or tried without a GPU: benchmarks/gpu.sh [python]
# About a quarter of an hour on an H200; the limits of its parts add up to 23 minutes on one GPU, to 27 on several.
# Leaves benchmarks/results/*.json and what was printed in out/gpu; then `python benchmarks/table.py` fills the README's tables.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON="${1:-python}"
OUT=out/gpu
GPUS=$("$PYTHON" -c "import torch; print(torch.cuda.device_count())") || GPUS=0
if [ "$GPUS" -lt 1 ]; then
  echo "benchmarks/gpu.sh: torch sees no CUDA device here ($PYTHON); run it on a machine with one." >&2
  exit 1
fi
mkdir -p "$OUT"
FAILED=()

# One part of the whole: a name, the seconds that it may take, and a command. What fails does not keep the rest from running.
part() {
  local name=$1 seconds=$2 status=0 started=$SECONDS
  shift 2
  echo "== $name: $*"
  # A training saves when it is asked to end: what takes longer than that is killed.
  timeout --kill-after 10 "$seconds" "$@" 2>&1 | tee "$OUT/$name.log" || status=$?
  case $status in
    0) echo "-- $name: $((SECONDS - started)) of $seconds s" ;;
    124 | 137) echo "-- $name: ended at its limit of $seconds s" && FAILED+=("$name") ;;
    *) echo "-- $name: failed after $((SECONDS - started)) s" && FAILED+=("$name") ;;
  esac
}

# A training of a few steps on as many processes as there are GPUs, under a file of examples/accelerate.
launch() {
  local name=$1 config=$2 processes=$3
  shift 3
  part "$name" 60 "$PYTHON" -m accelerate.commands.launch --config_file "examples/accelerate/$config.yaml" \
    --num_processes "$processes" -m musicrl_hf.cli "$@" --output_dir "$OUT/$name" --max_steps 3 --logging_steps 1
}

"$PYTHON" -c "import torch; print(torch.__version__, [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())])" \
  | tee "$OUT/machine.log"
part flat_vs_kv 60 "$PYTHON" benchmarks/flat_vs_kv.py --layers 24 --hidden 1024 --codebook_size 2048 --device cuda
part sampling 180 "$PYTHON" benchmarks/sampling.py --device cuda --batch 1 16 64 --repeats 3
part cuda_graph 60 "$PYTHON" benchmarks/cuda_graph.py --device cuda --batch 1 16 64 --repeats 3
part sampling_small 180 "$PYTHON" benchmarks/sampling.py --device cuda --size small --batch 1 16 64 --dtype bfloat16 --steps 48 --repeats 3
part training 240 "$PYTHON" benchmarks/training.py --device cuda --batch 4 32 --duration_s 3 --steps 8 --repeats 3
part training_small 240 "$PYTHON" benchmarks/training.py --device cuda --size small --bf16 --batch 8 16 --duration_s 10 --steps 3 --repeats 2 --against lm
part ppo_iteration 120 "$PYTHON" benchmarks/ppo_iteration.py --device cuda --bf16
part rollout 90 "$PYTHON" benchmarks/rollout.py --device cuda --repeats 2

head -n 16 src/musicrl_hf/prompts/train.txt > "$OUT/prompts.txt"
rm -rf "$OUT/votes"
part votes 60 "$PYTHON" -m musicrl_hf.cli pairs --prompts "$OUT/prompts.txt" --duration_s 1 --out "$OUT/votes"
PROMPTS=(--prompts "$OUT/prompts.txt" --duration_s 1 --per_device_train_batch_size 4)
launch dpo_one_gpu one_gpu 1 dpo --preferences "$OUT/votes" --bf16 true
launch ppo_one_gpu one_gpu 1 ppo "${PROMPTS[@]}"
if [ "$GPUS" -gt 1 ]; then
  launch dpo_several_gpus several_gpus "$GPUS" dpo --preferences "$OUT/votes"
  launch ppo_several_gpus several_gpus "$GPUS" ppo "${PROMPTS[@]}"
  launch dpo_fsdp2 fsdp2 "$GPUS" dpo --preferences "$OUT/votes"
  launch rloo_fsdp2 fsdp2 "$GPUS" rloo "${PROMPTS[@]}"
else
  echo "one GPU: several processes and FSDP 2 were not tried"
fi

if [ ${#FAILED[@]} -gt 0 ]; then
  echo "failed: ${FAILED[*]} (see $OUT)" >&2
  exit 1
fi
echo "done in $SECONDS s: see $OUT and benchmarks/results"
