#!/usr/bin/env bash
# The whole benchmark, most wanted first. It needs a GPU and many hours; stop it whenever you like and start it again.
#
#     bash benchmark/full.sh --jobs 5                             what is finished is skipped
#     bash benchmark/full.sh --devices cuda:0 cuda:1 cuda:2       several GPUs
#     bash benchmark/full.sh --list                               the commands, to read
#     bash benchmark/full.sh --seeds 1 -- --dataset synthetic --epochs 1 --init-epochs 1     a rehearsal
set -u

failed=0
run() {
    "$@" || failed=$?
    [ "$failed" -le 1 ] || exit "$failed"  # Ctrl-C or bad flags end it all, a failed run does not
}
sweep() { run python "$(dirname "$0")/sweep.py" "$@"; }

kd=(kd 'kd --ce-weight 1 --kd-weight 1')
icd=(icd 'icd --kd-weight 1')
r2kd=('r2kd --augment none' 'r2kd --augment mixup' r2kd)
# IE-KD's recipe for what it is compared with, without Nesterov momentum and reflection padding, which these files lack
recipe='--epochs 160 --batch-size 128 --lr 0.1 --milestones 80 120'

# ICD, R2KD and dual augmentation with their controls, and today's baselines
sweep --pairs resnet56/resnet56 --methods vanilla "$@"
sweep --pairs resnet56/resnet20 --methods vanilla "${kd[@]}" "${icd[@]}" "${r2kd[@]}" \
    dual_aug 'dual_aug --student-aug weak' 'dual_aug --same-view' crld \
    dkd dist ls crd 'crd --kd-weight 1' reviewkd "$@"

# IE-KD, inheritance only, exploration only, and what it is compared with, by its recipe
sweep --pairs resnet56/resnet20 --methods ie_kd 'ie_kd --exploration-weight 0' 'ie_kd --inheritance-weight 0' ie_od ie_at ie_dml \
    "ft --ft-variant original --ft-weight 500 $recipe" "ofd $recipe" "vanilla $recipe" "kd $recipe" "$@"

# Wide pairs, and one of two families
sweep --pairs resnet32x4/resnet8x4 wrn_40_2/wrn_16_2 vgg13/vgg8 \
    --methods vanilla "${kd[@]}" "${icd[@]}" crd dkd 'r2kd --augment none' r2kd "$@"
sweep --pairs resnet32x4/shufflenetv2 --methods vanilla kd 'icd --kd-weight 1' dkd 'r2kd --augment none' r2kd "$@"

# ICD's own questions
sweep --pairs resnet56/resnet20 --methods 'icd --alpha 0' 'icd --init-tau 0' "$@"

# All other methods
sweep --pairs resnet56/resnet20 --methods 'ls --loss dkd' nkd wttm 'wttm --loss ttm' ctkd 'kd --kd-temperature 1' mlld ofd srrl \
    simkd cat_kd rrd 'rrd --kd-weight 1' fitnet at sp cc vid rkd pkt ab ft fsp nst "$@"

# Transfer of the wrn_16_2 students
[[ " $* " == *' --list '* ]] && show=echo || show=
for weights in runs/*__wrn_16_2__cifar100__*seed1/student.pt; do
    for dataset in stl10 tinyimagenet; do
        for protocol in icd frozen hsakd; do
            [ ! -e "$weights" ] || run $show python "$(dirname "$0")/linear_probe.py" --student wrn_16_2 --weights "$weights" \
                --dataset "$dataset" --protocol "$protocol"
        done
    done
done
exit "$failed"
