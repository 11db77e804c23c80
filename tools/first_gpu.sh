#!/usr/bin/env bash
# Ten minutes on a new GPU: what no CPU can show, most evidence first. Run it in the root of the
# repository:
#
#     OUT=/tmp/out bash tools/first_gpu.sh
#     DRY=1 OUT=/tmp/out bash tools/first_gpu.sh     on a CPU
#
#   OUT       folder for the results: summary.txt, results.tgz, gpu.csv
#   BUDGET    seconds of the whole script, 590 by default; parts that no longer fit are skipped. With
#             a larger one each part may take longer, as it must on a machine with few cores.
#   NANOGPT   directory of nanoGPT's programs: then it is timed beside ours
#   DRY=1     every part on a CPU with a tiny model, one after the other: shows that the command
#             lines are right, and measures nothing. The tests of the GPU are collected and skipped.
#
# Only the project's own commands are run. Each has a time limit of its own, so that a failure or a
# hang does not lose the rest; after some of them, what there is so far is packed into OUT. The exit
# status is 1 if a part failed.
#
# 1. The machine's limits alone, while the CPU prepares the data. 2. All tests and all first
# compilations, at the same time where there are 8 cores or more: compiled kernels stay in a cache,
# so that 3. starts fast. 3. Timings, one after the other.
set -u
DRY=${DRY:-}
OUT=${OUT:-/tmp/gpu_out}
PYTHON=${PYTHON:-python3}
WORK=$(mktemp -d /tmp/gpu_work.XXXX)
LOGS=$WORK/logs
SUMMARY=$OUT/summary.txt
mkdir -p "$OUT" "$LOGS" "$WORK/bench" "$WORK/runs"
: >"$SUMMARY"
: >"$WORK/failed"
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1

# GPT-2 124M. MICRO: micro-steps of a step, with 64, 32, 16 and 12 sequences each.
DEVICE=cuda MODEL=() TINY=() T=1024 STEPS=40 LONG=8192 LONG_BATCH=4 NEW_TOKENS=500
TEN_MINUTES=590 # for which the limits of the parts are made
BUDGET=${BUDGET:-$TEN_MINUTES}
MICRO=(8 16 32 40)
if [ -n "$DRY" ]; then
    DEVICE=cpu T=64 STEPS=4 LONG=512 LONG_BATCH=1 NEW_TOKENS=50
    BUDGET=3600
    MICRO=(1 1 1 1)
    MODEL=(--n_layer=1 --n_head=2 --n_embd=16 --vocab_size=300 --compile=False --dtype=float32)
    TINY=(--tiny=True --budget_seconds=1)
fi

# Parts ----------------------------------------------------------------------------------------

say() { echo "$*" | tee -a "$SUMMARY"; }

left() { echo $((BUDGET - SECONDS)); }

pack() { # cheap, so that it can be done often
    cp "$WORK/gpu.csv" "$OUT/gpu.csv" 2>/dev/null
    (cd "$WORK" && find logs bench runs -type f \( -name '*.log' -o -name '*.jsonl' -o -name '*.json' \) \
        -not -path '*/step_*' | tar czf "$OUT/results.part" -T - && mv "$OUT/results.part" "$OUT/results.tgz")
}
trap 'pack; rm -rf "$WORK"' EXIT
trap 'exit 143' TERM INT

part() { # NAME SECONDS COMMAND...: run a command with a limit; note its status, seconds and last line
    local name=$1 limit=$2 start=$SECONDS status word=ok
    shift 2
    [ "$BUDGET" -gt "$TEN_MINUTES" ] && limit=$((limit * BUDGET / TEN_MINUTES))
    [ "$(left)" -lt "$((limit + 5))" ] && limit=$(($(left) - 5))
    if [ "$limit" -lt 12 ]; then
        say "skipped     $name: only $(left) s are left"
        return
    fi
    { timeout -k 5 "$limit" "$@" >"$LOGS/$name.log" 2>&1 </dev/null; } 2>/dev/null # bash reports no kill
    status=$?
    if [ $status != 0 ]; then
        word="FAILED $status"
        echo "$name" >>"$WORK/failed"
    fi
    say "$(printf '%-10s %-19s %4d s | %s' "$word" "$name" $((SECONDS - start)) \
        "$(grep -av '^$' "$LOGS/$name.log" | tail -n 1 | cut -c1-160)")"
}

JOBS=()
at_once() { # COMMAND...: run a part beside others; in a dry run or on few cores alone
    "$@" &
    JOBS+=($!)
    if [ -n "$DRY" ] || [ "$(nproc)" -lt 8 ]; then wait $!; fi
}

train_in() { # FOLDER NAME SECONDS [torchrun] OPTIONS...: a run of train.py in $WORK/runs/FOLDER
    local folder=$1 name=$2 limit=$3 launcher=("$PYTHON")
    shift 3
    if [ "$1" = torchrun ]; then
        launcher=("$PYTHON" -m torch.distributed.run --standalone --local-addr=127.0.0.1 --nproc_per_node=1)
        shift
    fi
    part "$name" "$limit" "${launcher[@]}" train.py config/gpt2.py --dataset=stdlib --device=$DEVICE \
        --out_dir="$WORK/runs/$folder" --warmup_steps=10 --eval_interval=100000 --eval_tokens=65536 \
        --checkpoint_interval=100000 --log_interval=5 --block_size=$T ${MODEL[@]+"${MODEL[@]}"} "$@"
}

train() { train_in "$1" "$@"; }

batches() { # SEQUENCES MICRO_STEPS: options for steps of so many micro-steps of so many sequences
    echo "--batch_size=$1 --total_batch_size=$(($1 * T * $2))"
}

warm() { # NAME [torchrun] OPTIONS...: two steps of one micro-step each, to compile
    local name=$1
    shift
    train "warm-$name" $L "$@" --max_steps=2 --eval_tokens=1024
}

warm_two() { # one after the other, which leaves the tests some of the memory
    warm b12 --bias=False $(batches 12 1)
    warm swa --model=model_swa "${LONG_STEP[@]}"
}

bench() { # NAME SECONDS WHAT OPTIONS...: a benchmark
    local name=$1 limit=$2
    shift 2
    part "bench-$name" "$limit" "$PYTHON" -m tools.bench "$@" --device=$DEVICE --out_dir="$WORK/bench" \
        ${TINY[@]+"${TINY[@]}"}
}

gpu_tests() { # NAME EXPRESSION: a part of tests/training/test_gpu.py
    part "tests-$1" $L "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu tests/training/test_gpu.py -k "$2" --tb=short
}

# 1. The machine, its limits, the data ---------------------------------------------------------

VERSIONS='import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda, "cuDNN", torch.backends.cudnn.version(), torch.cuda.is_available() and torch.cuda.get_device_name())'
{
    nvidia-smi
    nproc
    "$PYTHON" -c "$VERSIONS"
} >"$LOGS/machine.log" 2>&1 # one of them may be missing
say "$(tail -n 1 "$LOGS/machine.log")"
WATCH=
if [ $DEVICE = cuda ]; then
    nvidia-smi --query-gpu=timestamp,clocks.sm,power.draw,temperature.gpu,utilization.gpu,memory.used \
        --format=csv -l 2 >"$WORK/gpu.csv" 2>/dev/null &
    WATCH=$!
fi
at_once part data 60 "$PYTHON" prepare_data.py stdlib
bench limits 45 limits --budget_seconds=20
wait "${JOBS[@]}"
pack

# 2. Tests and first compilations, at the same time --------------------------------------------

say "--- tests and first compilations, from second $SECONDS on"
export TORCHINDUCTOR_COMPILE_THREADS=3
L=200 # seconds at most
LONG_STEP=(--block_size=$LONG --batch_size=$LONG_BATCH --total_batch_size=$((LONG_BATCH * LONG)))
JOBS=()
at_once gpu_tests unit "loss_and_gradients or cached_logits or windows"
at_once gpu_tests eager1 "float32_on_the_gpu or tf32 or memory_of_the_gpu or evaluation or prefetches"
at_once gpu_tests eager2 "half_precision or stopped or greedy"
at_once gpu_tests long "long_run and not swa"
at_once gpu_tests long-swa "long_run and swa"
at_once gpu_tests deterministic "deterministic_runs or compiled_graph"
at_once gpu_tests waits "a_step_waits"
at_once gpu_tests launched "nccl or needs_no_more_memory"
at_once warm b32 $(batches 32 1)
at_once warm ddp torchrun $(batches 32 1)
at_once warm fsdp torchrun --fsdp=True $(batches 32 1)
at_once warm full "${LONG_STEP[@]}"
at_once warm_two
wait "${JOBS[@]}"
unset TORCHINDUCTOR_COMPILE_THREADS
pack

# 3. Timings, one after the other, the most wanted first ---------------------------------------

say "--- timings, from second $SECONDS on"
bench train 90 train --budget_seconds=50 ${NANOGPT:+--nanogpt="$NANOGPT"}
pack
# GPT-2 124M learns Python's library by bytes: the loss must fall, and the MFU is that of a real run.
train learn 110 $(batches 32 "${MICRO[1]}") --max_steps=$STEPS
pack
# model_swa.py's windows against FlashAttention's, in a step of 4096 tokens, too
bench attention 90 attention --budget_seconds=60
bench decode 80 decode --budget_seconds=40
part sample 40 "$PYTHON" sample.py --init_from="$WORK/runs/learn" --prompt="def " \
    --max_new_tokens=$NEW_TOKENS --device=$DEVICE
pack
# Plain nanoGPT's settings: no biases, 12 sequences x 40 micro-steps
train nanogpt 60 --bias=False $(batches 12 "${MICRO[3]}") --max_steps=12
LONG_RUN=(--block_size=$LONG --batch_size=$LONG_BATCH --total_batch_size=$((4 * LONG_BATCH * LONG)) --max_steps=10)
train swa-long 45 --model=model_swa "${LONG_RUN[@]}"
train full-long 45 "${LONG_RUN[@]}"
train fsdp 55 torchrun --fsdp=True $(batches 32 "${MICRO[1]}") --max_steps=8
train ddp 55 torchrun $(batches 32 "${MICRO[1]}") --max_steps=8
pack
train_in learn resume 45 $(batches 32 "${MICRO[1]}") --max_steps=$((STEPS + 3))
# The same step with FlashAttention instead of cuDNN's attention
TORCH_CUDNN_SDPA_DEPRIORITIZED=1 train b32-flash 60 $(batches 32 "${MICRO[1]}") --max_steps=8
train b64 60 $(batches 64 "${MICRO[0]}") --max_steps=8
train b16 60 $(batches 16 "${MICRO[2]}") --max_steps=8
train muon 60 --optimizer=muon $(batches 32 "${MICRO[1]}") --max_steps=8
bench sample 90 sample --budget_seconds=45
pack
[ "$(left)" -gt 90 ] && bench memory 300 memory --budget_seconds=$(($(left) - 60))

# 4. Summary -----------------------------------------------------------------------------------

[ -n "$WATCH" ] && kill "$WATCH" 2>/dev/null
"$PYTHON" - "$WORK" <<'END' 2>&1 | tee -a "$SUMMARY"
import json, statistics, sys
from pathlib import Path

print(f"{'run':12} {'steps':>5} {'first loss':>10} {'last loss':>9} {'tok/s':>9} {'MFU':>6} {'GB':>6}")
for log in sorted(Path(sys.argv[1], "runs").glob("*/log.jsonl")):
    steps = [r for r in map(json.loads, log.read_text().splitlines()) if r.get("train_loss") is not None]
    if log.parent.name.startswith("warm") or len(steps) < 3:
        continue
    late = steps[len(steps) // 2 :]
    speed = statistics.median(r["tokens_per_second"] for r in late)
    mfu = statistics.median(r["mfu"] or 0 for r in late)
    print(
        f"{log.parent.name:12} {len(steps):5} {steps[0]['train_loss']:10.3f} {steps[-1]['train_loss']:9.3f} "
        f"{speed:9.0f} {mfu:6.1%} {steps[-1]['memory_gb'] or 0:6.1f}"
    )
END
FAILED=$(paste -sd ' ' "$WORK/failed")
say "finished after $SECONDS s; failed: ${FAILED:-none}"
[ -z "$FAILED" ]
