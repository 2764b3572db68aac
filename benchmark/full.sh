#!/usr/bin/env bash
# Five pairs on CIFAR-100, most wanted first. It needs a GPU and many hours; kill it whenever you like and start it again.
#
#     bash benchmark/full.sh --jobs 5                             what is finished is skipped
#     bash benchmark/full.sh --list                               the commands, to read
#     bash benchmark/full.sh --seeds 1 -- --dataset synthetic --epochs 1     a rehearsal of the same order
set -u

failed=0
sweep() {
    python "$(dirname "$0")/sweep.py" "$@" || failed=$?
    [ "$failed" -le 1 ] || exit "$failed"  # Ctrl-C or bad flags end it all, a failed run does not
}

kd=('kd' 'kd --ce-weight 1 --kd-weight 1')
icd=('icd' 'icd --kd-weight 1')
# IE-KD's recipe for what it is compared with, but for Nesterov momentum and reflect padding, which these files have not
recipe='--epochs 160 --batch-size 128 --lr 0.1 --milestones 80 120'

# ICD, R2KD, Dual Augmentation and IE-KD with their controls, and CRD
sweep --pairs resnet56/resnet20 --methods vanilla "${kd[@]}" "${icd[@]}" \
    'r2kd --augment none' 'r2kd --augment mixup' r2kd \
    dual_aug 'dual_aug --student-aug weak' 'dual_aug --same-view' \
    crd 'crd --kd-weight 1' \
    ie_kd "ft --ft-variant original --ft-weight 500 $recipe" 'ie_kd --exploration-weight 0' 'ie_kd --inheritance-weight 0' \
    "vanilla $recipe" "kd $recipe" \
    'icd --alpha 0' 'icd --init-tau 0' "$@"

# What they are compared with
sweep --pairs resnet56/resnet20 --methods fitnet at sp cc vid rkd pkt ab ft fsp nst ie_at ie_dml "$@"

# Wide pairs, and one of two families
sweep --pairs resnet32x4/resnet8x4 wrn_40_2/wrn_16_2 vgg13/vgg8 \
    --methods vanilla "${kd[@]}" "${icd[@]}" crd 'r2kd --augment none' r2kd "$@"
sweep --pairs resnet32x4/shufflenetv2 --methods vanilla kd 'icd --kd-weight 1' 'r2kd --augment none' r2kd "$@"
exit "$failed"
