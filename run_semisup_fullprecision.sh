#!/usr/bin/env bash
# Semi-supervised CMSF as in the paper (10% of the labels, full precision): train, k-NN, linear evaluation
# and fine-tuning on the labeled images, one table at the end (also in $OUT/results.json), and a page that
# shows it with curves, neighbors and features ($OUT/report.html).
#
#   DATA=/imagenet bash run_semisup_fullprecision.sh              the paper's settings
#   GPUS=4 DATA=/imagenet bash run_semisup_fullprecision.sh       the same by four processes under torchrun
#   bash run_semisup_fullprecision.sh                             the demo data and a small network, minutes
#
# Every variable below can be set from the environment, each stage be switched off with 0:
#   TRAIN=0 OUT=output/semisup DATA=/imagenet bash run_semisup_fullprecision.sh
#
# Stopped, killed or failed, the same command goes on where it was; what is done is not done again.
# Other settings than those of the outputs in OUT are refused: name another OUT, or say ANEW=1 once,
# which moves the outputs that they concern to $OUT/earlier_N.
set -uo pipefail
root=$(cd "$(dirname "$0")" && pwd)

DATA=${DATA:-}                      # folder with train/<class>/ and val/<class>/; empty: the demo data
PYTHON=${PYTHON:-python}
WORKERS=${WORKERS:-}                # empty: the scripts' default
GPUS=${GPUS:-1}                     # processes of every stage, one a GPU; without a GPU on the CPU
SPLIT_FILE=${SPLIT_FILE:-}          # labeled images, one a line; empty: LABEL_FRACTION of every class
TRAIN=${TRAIN:-1} KNN=${KNN:-1} LINEAR=${LINEAR:-1} FINETUNE=${FINETUNE:-1} # the stages
REPORT=${REPORT:-1}                 # the page: curves, pictures, results, is the run healthy
BASELINES=${BASELINES:-1}           # raw pixels, random network; in the demo 2Q and the labels alone
ANEW=${ANEW:-0}                     # 1: move earlier outputs in OUT aside and start anew

# defaults DECIDES NAME=DEFAULT[:DEMO]...: variables, their defaults, and those for the demo data where
# they are others. DECIDES: what they decide, a list of their names.
defaults() {
  local -n names=$1
  local one name value
  for one in "${@:2}"; do
    name=${one%%=*} value=${one#*=}
    if [ -n "$DATA" ]; then value=${value%%:*}; else value=${value##*:}; fi
    names+=("$name")
    [ -n "${!name:-}" ] || printf -v "$name" %s "$value"
  done
}
defaults place OUT=output/semisup:output/semisup_demo
defaults training SEED=0 ARCH=resnet50:conv4 IMAGE_SIZE=224:32 BATCH_SIZE=256:32 EPOCHS=200:60 \
  LEARNING_RATE=0.05 MOMENTUM=0.99 MEM_BANK_SIZE=128000:512 SUP_MEM_BANK_SIZE=128000:512 TOPK=10:50 \
  CONSTRAINT_START=1:20 CONF_TH=0.85:0.95 HEAD=mlp HEAD_EPOCHS=10 HEAD_SCHEDULE=15,30,40 LABEL_FRACTION=0.1
defaults training TOPK_PLAIN="$TOPK:1"
defaults evaluation LINEAR_LR=0.01:0.1 LINEAR_EPOCHS=40 EVAL_FREQ=5:50 \
  FT_LR=0.001:0.05 FT_EPOCHS=20:100 FT_SCHEDULE=15,35,50:60,80 FT_BATCH_SIZE=256:32
# The labels alone: as many views of images as the other rows' training has.
defaults evaluation XENT_LR=0.05 XENT_EPOCHS=600 XENT_SCHEDULE=400,520
case "$OUT" in "~" | "~/"*) OUT="$HOME${OUT#"~"}" ;; esac
case "$OUT" in /*) ;; *) OUT="$PWD/$OUT" ;; esac
trained=(train train_2q) evaluated=(semi pixels random xent 2q results.json report.html) # in OUT
settings="$OUT/settings.txt"        # of the outputs there

if [ -n "$DATA" ]; then data=("$DATA"); else data=(--demo); fi
run=("$PYTHON")
[ "$GPUS" = 1 ] || run+=(-m torch.distributed.run --standalone --nproc_per_node="$GPUS") # torchrun
common=(--seed "$SEED" ${WORKERS:+--num_workers "$WORKERS"})
if [ -n "$SPLIT_FILE" ]; then split=(--sup-split-file "$SPLIT_FILE"); else split=(--label_fraction "$LABEL_FRACTION"); fi
labeled="$OUT/train/labeled.txt"    # written by the training: evaluation uses the same images
checkpoint="$OUT/train/ckpt_epoch_$EPOCHS.pth"

child='' told=''                    # the stage that runs; the code to end with when told to stop
trap 'told=143; stop' TERM
trap 'told=130; stop' INT
stop() { [ -z "$child" ] || kill -TERM "$child" 2>/dev/null; }

# stage NAME COMMAND...: run a command; if it fails, say which stage it was and stop.
stage() {
  local name=$1 code
  shift
  echo "=== $name"
  "$@" &                            # not in front: a signal to this script is passed on at once
  child=$!
  [ -z "$told" ] || stop            # it came just before
  while kill -0 "$child" 2>/dev/null; do wait "$child"; done
  wait "$child"
  code=$? child=''
  [ "$code" -ne 0 ] && [ "$told" != 130 ] || code=${told:-$code}
  if [ "$code" -ne 0 ]; then
    echo "stage '$name' failed with exit code $code: $*" >&2
    if [ "$code" = 2 ] && [[ $name = training* ]] && [ -n "$made" ]; then
      echo "what is in $OUT is kept: to begin another run, name another OUT, or say ANEW=1" >&2
    fi
    echo "${0##*/}: the same command goes on from here; what is done is not done again" >&2
    exit "$code"
  fi
}

# differing NAME...: which of these settings the outputs in OUT have otherwise.
differing() {
  local name before now
  [ -n "$made" ] && [ -f "$settings" ] || return
  for name in "$@"; do
    before=$(sed -n "s/^$name=//p" "$settings") now=$(printf %q "${!name}")
    [ -z "$before" ] || [ "$before" = "$now" ] || printf '%s=%s, not %s; ' "$name" "$before" "$now"
  done
}

# move_aside NAME...: put these outputs into a new folder in OUT.
move_aside() {
  local number=1 name
  while [ -e "$OUT/earlier_$number" ]; do number=$((number + 1)); done
  mkdir "$OUT/earlier_$number" || exit
  cp "$settings" "$OUT/earlier_$number/" 2>/dev/null
  for name in "$@"; do
    [ ! -e "$OUT/$name" ] || mv "$OUT/$name" "$OUT/earlier_$number/" || exit
  done
  echo "earlier outputs moved to $OUT/earlier_$number: $*"
}

# settle: refuse other settings than those of the outputs in OUT, or move these aside; note them.
settle() {
  local name of_training of_evaluation
  of_training=$(differing "${training[@]}") of_evaluation=$(differing "${evaluation[@]}")
  if [ -n "$made" ] && [ "$ANEW" != 0 ]; then
    if [ -z "$of_training" ] && [ -n "$of_evaluation" ]; then
      move_aside "${evaluated[@]}"
    else
      move_aside "${trained[@]}" "${evaluated[@]}"
    fi
  elif [ -n "$of_training$of_evaluation" ]; then
    echo "${0##*/}: $OUT has outputs of $of_training${of_evaluation}nothing was changed: name" \
      "another OUT, or say ANEW=1, which moves them aside" >&2
    exit 2
  fi
  for name in "${training[@]}" "${evaluation[@]}"; do printf '%s=%q\n' "$name" "${!name}"; done \
    > "$settings.new" && mv "$settings.new" "$settings" || exit
}

# evaluate NAME FOLDER WEIGHTS FLAGS...: k-NN and a linear classifier on the labeled images.
evaluate() {
  local name=$1 folder=$2 weights=$3
  shift 3
  local flags=(--weights "$weights" --arch "$ARCH" "${common[@]}" "${again[@]}" "$@")
  mkdir -p "$folder"
  [ "$KNN" = 0 ] || stage "k-NN, $name" \
    "${run[@]}" "$root/eval/eval_knn.py" "${flags[@]}" --save "$folder" "${data[@]}"
  [ "$LINEAR" = 0 ] || stage "linear, $name" \
    "${run[@]}" "$root/eval/eval_linear.py" "${flags[@]}" --cached --lr "$LINEAR_LR" \
    --epochs "$LINEAR_EPOCHS" --resume auto "${labels[@]}" --save "$folder/linear" "${data[@]}"
}

# finetune NAME FOLDER WEIGHTS [LR EPOCHS SCHEDULE]: the whole encoder on the labeled images.
finetune() {
  [ "$FINETUNE" = 0 ] || stage "fine-tuning, $1" \
    "${run[@]}" "$root/eval/eval_linear.py" --weights "$3" --arch "$ARCH" --image_size "$IMAGE_SIZE" \
    "${common[@]}" "${again[@]}" --fine-tune --lr "${4:-$FT_LR}" --epochs "${5:-$FT_EPOCHS}" \
    --lr_schedule "${6:-$FT_SCHEDULE}" --batch_size "$FT_BATCH_SIZE" --eval_freq "$EVAL_FREQ" --resume auto "${labels[@]}" \
    --save "$2/finetune" "${data[@]}"
}

# A function, so that all of the script is read before the first stage, and may change meanwhile.
main() {
  mkdir -p "$OUT" || exit
  made=$(find "$OUT" -name 'earlier_*' -prune -o \
    \( -name 'ckpt_*' -o -name 'linear.*' -o -name knn.json \) -print -quit)
  settle
  # What an evaluation would refuse is refused before the training.
  again=(--check)
  if [ -n "$SPLIT_FILE" ]; then labels=(--train-file "$SPLIT_FILE"); else labels=("${split[@]}"); fi
  if [ "$TRAIN" != 0 ] && [ ! -f "$checkpoint" ]; then
    evaluate "checked before the training" "$OUT/semi" random --image_size "$IMAGE_SIZE"
    finetune "checked before the training" "$OUT/semi" random
  fi
  again=(--keep_done) labels=(--train-file "$labeled")

  [ "$TRAIN" = 0 ] || stage "training" \
    "${run[@]}" "$root/semi_supervised/train_pseudo_cmsf.py" --cos --weak_strong --arch "$ARCH" \
    --image_size "$IMAGE_SIZE" --batch_size "$BATCH_SIZE" --epochs "$EPOCHS" \
    --learning_rate "$LEARNING_RATE" --momentum "$MOMENTUM" --topk "$TOPK" --topk_plain "$TOPK_PLAIN" \
    --constraint_start "$CONSTRAINT_START" --mem_bank_size "$MEM_BANK_SIZE" \
    --sup_mem_bank_size "$SUP_MEM_BANK_SIZE" --cache_sup --use_conf --conf_th "$CONF_TH" \
    --mlp_xent "$HEAD" --pseudo_lbl_epochs "$HEAD_EPOCHS" --pseudo_lbl_lr_schedule "$HEAD_SCHEDULE" \
    --knn_freq -1 --checkpoint_path "$OUT/train" --resume auto "${common[@]}" "${split[@]}" "${data[@]}"
  evaluate "semi-supervised" "$OUT/semi" "$checkpoint"
  finetune "semi-supervised" "$OUT/semi" "$checkpoint"

  rows=()
  if [ "$BASELINES" != 0 ]; then
    evaluate "raw pixels" "$OUT/pixels" pixels --image_size 32
    evaluate "random network" "$OUT/random" random --image_size "$IMAGE_SIZE"
    rows+=("raw pixels=$OUT/pixels" "random network=$OUT/random")
    if [ -z "$DATA" ]; then
      mkdir -p "$OUT/xent"
      finetune "the labels alone" "$OUT/xent" random "$XENT_LR" "$XENT_EPOCHS" "$XENT_SCHEDULE"
      [ "$TRAIN" = 0 ] || stage "training 2Q" \
        "${run[@]}" "$root/self_supervised/train_msf_2q.py" --epochs "$EPOCHS" --knn_freq -1 \
        --checkpoint_path "$OUT/train_2q" --resume auto "${common[@]}" "${data[@]}"
      evaluate "2Q" "$OUT/2q" "$OUT/train_2q/ckpt_epoch_$EPOCHS.pth"
      finetune "2Q" "$OUT/2q" "$OUT/train_2q/ckpt_epoch_$EPOCHS.pth"
      rows+=("the labels alone (cross-entropy)=$OUT/xent" "self-supervised 2Q=$OUT/2q")
    fi
  fi
  rows+=("semi-supervised CMSF=$OUT/semi")
  echo
  echo "accuracy on val/, percent; linear and fine-tuned: with the labeled images only"
  stage "table" "$PYTHON" "$root/eval/compare.py" --save "$OUT" --results "${rows[@]}"
  if [ "$REPORT" != 0 ] && [ -f "$OUT/train/log.jsonl" ]; then
    echo
    stage "neighbors" "$PYTHON" "$root/eval/show_neighbors.py" --weights "$checkpoint" \
      --output "$OUT/train/neighbors.png" "${common[@]}" "${data[@]}"
    stage "features" "${run[@]}" "$root/eval/show_features.py" --weights "$checkpoint" \
      --output "$OUT/train/features.svg" "${common[@]}" "${data[@]}"
    stage "report" "$PYTHON" "$root/eval/report.py" "$OUT/train" --results "$OUT/semi" \
      --output "$OUT/report.html"
  fi
}

main; exit
