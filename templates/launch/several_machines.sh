#!/usr/bin/env bash
# Starts a recipe on several machines by torchrun. Run it on every machine, with its own NODE_RANK and the same HEAD:
#
#   NODES=2 NODE_RANK=0 HEAD=10.0.0.1 bash several_machines.sh RECIPE    # on the first machine, whose address HEAD is
#   NODES=2 NODE_RANK=1 HEAD=10.0.0.1 bash several_machines.sh RECIPE    # on the second
#
# RECIPE is co2_multi_node (weights exchanged late, for slow links), lm_pretrain_ddp, lm_pretrain_fsdp2,
# image_classification_ddp, or any other whose vars have nodes and devices.
#
# PROCESSES   processes of each machine, the same on all; by default one a GPU, or one without a GPU
# PORT        a free port of the first machine that the others reach
# PYTHON      the interpreter that has lightning-stable in it; by default python, as in an environment that is active
#
# Arguments go on to the run: ... bash several_machines.sh co2_multi_node --vars.local_steps 48
# To go on, --ckpt_path FILE: every machine reads it, so it has to be on a disk that all share, or copied to each.
# Where machines have several networks, name the one to use: GLOO_SOCKET_IFNAME (CPU) or NCCL_SOCKET_IFNAME (GPU).
set -euo pipefail

: "${NODES:?Set NODES to the number of machines, NODE_RANK to the number of this one from 0, HEAD to the address of the first.}"
: "${NODE_RANK:?Set NODE_RANK to the number of this machine: 0 on the first, 1 on the second, ...}"
: "${HEAD:?Set HEAD to the address of the first machine, as the others reach it.}"
: "${1:?Name a recipe: bash several_machines.sh co2_multi_node. There are more: lightning-stable show recipes}"
PORT="${PORT:-29500}"
if [[ -z "${PROCESSES:-}" ]]; then
  PROCESSES=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
  ((PROCESSES > 0)) || PROCESSES=1
fi

exec "${PYTHON:-python}" -m torch.distributed.run \
  --nnodes "$NODES" --node-rank "$NODE_RANK" --nproc-per-node "$PROCESSES" \
  --master-addr "$HEAD" --master-port "$PORT" \
  --module lightning_stable.cli.main run "$1" \
  --vars.nodes "$NODES" --vars.devices "$PROCESSES" "${@:2}"
