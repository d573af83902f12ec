#!/usr/bin/env bash
# Semi-supervised CMSF as in the paper (10% of the labels, full precision): train, k-NN, linear evaluation
# and fine-tuning on the labeled images, one table at the end (also in $OUT/results.json), and a page that
# shows it with curves and neighbors ($OUT/report.html).
#
#   DATA=/imagenet bash run_semisup_fullprecision.sh              the paper's settings
#   GPUS=4 DATA=/imagenet bash run_semisup_fullprecision.sh       the same by four processes under torchrun
#   bash run_semisup_fullprecision.sh                             the demo data and a small network, minutes
#
# Every variable below can be set from the environment, each stage be switched off with 0:
#   TRAIN=0 OUT=output/semisup DATA=/imagenet bash run_semisup_fullprecision.sh
set -uo pipefail
root=$(cd "$(dirname "$0")" && pwd)

DATA=${DATA:-}                      # folder with train/<class>/ and val/<class>/; empty: the demo data
PYTHON=${PYTHON:-python}
SEED=${SEED:-0}
WORKERS=${WORKERS:-}                # empty: the scripts' default
GPUS=${GPUS:-1}                     # processes of every stage, one a GPU; without a GPU on the CPU
SPLIT_FILE=${SPLIT_FILE:-}          # labeled images, one a line; empty: LABEL_FRACTION of every class
LABEL_FRACTION=${LABEL_FRACTION:-0.1}
TRAIN=${TRAIN:-1} KNN=${KNN:-1} LINEAR=${LINEAR:-1} FINETUNE=${FINETUNE:-1} # the stages
REPORT=${REPORT:-1}                 # the page: curves, neighbors, results, is the run healthy
BASELINES=${BASELINES:-1}           # raw pixels, random network; in the demo 2Q and the labels alone

if [ -n "$DATA" ]; then
  data=("$DATA") pixels=32
  OUT=${OUT:-output/semisup}
  ARCH=${ARCH:-resnet50} IMAGE_SIZE=${IMAGE_SIZE:-224} BATCH_SIZE=${BATCH_SIZE:-256}
  EPOCHS=${EPOCHS:-200} LEARNING_RATE=${LEARNING_RATE:-0.05} MOMENTUM=${MOMENTUM:-0.99}
  MEM_BANK_SIZE=${MEM_BANK_SIZE:-128000} SUP_MEM_BANK_SIZE=${SUP_MEM_BANK_SIZE:-128000}
  TOPK=${TOPK:-10} TOPK_PLAIN=${TOPK_PLAIN:-$TOPK} CONSTRAINT_START=${CONSTRAINT_START:-1}
  CONF_TH=${CONF_TH:-0.85} HEAD=${HEAD:-mlp} HEAD_EPOCHS=${HEAD_EPOCHS:-10}
  HEAD_SCHEDULE=${HEAD_SCHEDULE:-15,30,40}
  LINEAR_LR=${LINEAR_LR:-0.01} LINEAR_EPOCHS=${LINEAR_EPOCHS:-40}
  FT_LR=${FT_LR:-0.001} FT_EPOCHS=${FT_EPOCHS:-20} FT_SCHEDULE=${FT_SCHEDULE:-15,35,50}
  FT_BATCH_SIZE=${FT_BATCH_SIZE:-256} EVAL_FREQ=${EVAL_FREQ:-5}
else
  data=(--demo) pixels=32
  OUT=${OUT:-output/semisup_demo}
  ARCH=${ARCH:-conv4} IMAGE_SIZE=${IMAGE_SIZE:-32} BATCH_SIZE=${BATCH_SIZE:-32}
  EPOCHS=${EPOCHS:-60} LEARNING_RATE=${LEARNING_RATE:-0.05} MOMENTUM=${MOMENTUM:-0.99}
  MEM_BANK_SIZE=${MEM_BANK_SIZE:-512} SUP_MEM_BANK_SIZE=${SUP_MEM_BANK_SIZE:-512}
  TOPK=${TOPK:-50} TOPK_PLAIN=${TOPK_PLAIN:-1} CONSTRAINT_START=${CONSTRAINT_START:-20}
  CONF_TH=${CONF_TH:-0.95} HEAD=${HEAD:-mlp} HEAD_EPOCHS=${HEAD_EPOCHS:-10}
  HEAD_SCHEDULE=${HEAD_SCHEDULE:-15,30,40}
  LINEAR_LR=${LINEAR_LR:-0.1} LINEAR_EPOCHS=${LINEAR_EPOCHS:-40}
  FT_LR=${FT_LR:-0.05} FT_EPOCHS=${FT_EPOCHS:-100} FT_SCHEDULE=${FT_SCHEDULE:-60,80}
  FT_BATCH_SIZE=${FT_BATCH_SIZE:-32} EVAL_FREQ=${EVAL_FREQ:-50}
fi
# The labels alone: as many views of images as the other rows' training has.
XENT_LR=${XENT_LR:-0.05} XENT_EPOCHS=${XENT_EPOCHS:-600} XENT_SCHEDULE=${XENT_SCHEDULE:-400,520}
case "$OUT" in /*) ;; *) OUT="$PWD/$OUT" ;; esac

run=("$PYTHON")
[ "$GPUS" = 1 ] || run+=(-m torch.distributed.run --standalone --nproc_per_node="$GPUS") # torchrun
common=(--seed "$SEED" ${WORKERS:+--num_workers "$WORKERS"})
if [ -n "$SPLIT_FILE" ]; then split=(--sup-split-file "$SPLIT_FILE"); else split=(--label_fraction "$LABEL_FRACTION"); fi
labeled="$OUT/train/labeled.txt"    # written by the training: evaluation uses the same images
checkpoint="$OUT/train/ckpt_epoch_$EPOCHS.pth"

# stage NAME COMMAND...: run a command; if it fails, say which stage it was and stop.
stage() {
  local name=$1 code=0
  shift
  echo "=== $name"
  "$@" || code=$?
  if [ "$code" -ne 0 ]; then
    echo "stage '$name' failed with exit code $code: $*" >&2
    exit "$code"
  fi
}

# evaluate NAME FOLDER WEIGHTS FLAGS...: k-NN and a linear classifier on the labeled images.
evaluate() {
  local name=$1 folder=$2 weights=$3
  shift 3
  local flags=(--weights "$weights" --arch "$ARCH" "${common[@]}" "$@")
  mkdir -p "$folder"
  [ "$KNN" = 0 ] || stage "k-NN, $name" \
    "${run[@]}" "$root/eval/eval_knn.py" "${flags[@]}" --save "$folder" "${data[@]}"
  [ "$LINEAR" = 0 ] || stage "linear, $name" \
    "${run[@]}" "$root/eval/eval_linear.py" "${flags[@]}" --cached --lr "$LINEAR_LR" \
    --epochs "$LINEAR_EPOCHS" --train-file "$labeled" --save "$folder/linear" "${data[@]}"
}

# finetune NAME FOLDER WEIGHTS LR EPOCHS SCHEDULE: the whole encoder on the labeled images.
finetune() {
  [ "$FINETUNE" = 0 ] || stage "fine-tuning, $1" \
    "${run[@]}" "$root/eval/eval_linear.py" --weights "$3" --arch "$ARCH" --image_size "$IMAGE_SIZE" \
    "${common[@]}" --fine-tune --lr "$4" --epochs "$5" --lr_schedule "$6" --batch_size "$FT_BATCH_SIZE" \
    --train-file "$labeled" --eval_freq "$EVAL_FREQ" --save "$2/finetune" "${data[@]}"
}

[ "$TRAIN" = 0 ] || stage "training" \
  "${run[@]}" "$root/semi_supervised/train_pseudo_cmsf.py" --cos --weak_strong --arch "$ARCH" \
  --image_size "$IMAGE_SIZE" --batch_size "$BATCH_SIZE" --epochs "$EPOCHS" \
  --learning_rate "$LEARNING_RATE" --momentum "$MOMENTUM" --topk "$TOPK" --topk_plain "$TOPK_PLAIN" \
  --constraint_start "$CONSTRAINT_START" --mem_bank_size "$MEM_BANK_SIZE" \
  --sup_mem_bank_size "$SUP_MEM_BANK_SIZE" --cache_sup --use_conf --conf_th "$CONF_TH" \
  --mlp_xent "$HEAD" --pseudo_lbl_epochs "$HEAD_EPOCHS" --pseudo_lbl_lr_schedule "$HEAD_SCHEDULE" \
  --knn_freq -1 --checkpoint_path "$OUT/train" "${common[@]}" "${split[@]}" "${data[@]}"
evaluate "semi-supervised" "$OUT/semi" "$checkpoint"
finetune "semi-supervised" "$OUT/semi" "$checkpoint" "$FT_LR" "$FT_EPOCHS" "$FT_SCHEDULE"

rows=()
if [ "$BASELINES" != 0 ]; then
  evaluate "raw pixels" "$OUT/pixels" pixels --image_size "$pixels"
  evaluate "random network" "$OUT/random" random --image_size "$IMAGE_SIZE"
  rows+=("raw pixels=$OUT/pixels" "random network=$OUT/random")
  if [ -z "$DATA" ]; then
    mkdir -p "$OUT/xent"
    finetune "the labels alone" "$OUT/xent" random "$XENT_LR" "$XENT_EPOCHS" "$XENT_SCHEDULE"
    [ "$TRAIN" = 0 ] || stage "training 2Q" \
      "${run[@]}" "$root/self_supervised/train_msf_2q.py" --epochs "$EPOCHS" --knn_freq -1 \
      --checkpoint_path "$OUT/train_2q" "${common[@]}" "${data[@]}"
    evaluate "2Q" "$OUT/2q" "$OUT/train_2q/ckpt_epoch_$EPOCHS.pth"
    finetune "2Q" "$OUT/2q" "$OUT/train_2q/ckpt_epoch_$EPOCHS.pth" "$FT_LR" "$FT_EPOCHS" "$FT_SCHEDULE"
    rows+=("the labels alone (cross-entropy)=$OUT/xent" "self-supervised 2Q=$OUT/2q")
  fi
fi
rows+=("semi-supervised CMSF=$OUT/semi")
echo
echo "accuracy on val/, percent; linear and fine-tuned: with the labeled images only"
stage "table" "$PYTHON" "$root/eval/compare.py" --save "$OUT" "${rows[@]}"
if [ "$REPORT" != 0 ] && [ -f "$OUT/train/log.jsonl" ]; then
  echo
  stage "neighbors" "$PYTHON" "$root/eval/show_neighbors.py" --weights "$checkpoint" \
    --output "$OUT/train/neighbors.png" "${common[@]}" "${data[@]}"
  stage "report" "$PYTHON" "$root/eval/report.py" "$OUT/train" --results "$OUT/semi" \
    --output "$OUT/report.html"
fi
