"""Everything that depends on how weights and optimizer state are sharded: FSDP2 (fully_shard) and DeepSpeed ZeRO.

Checkpoints do not depend on the sharding. The weights are a full state dict, and the optimizer state is stored by
parameter, field and row. So a run can resume with another number of processes, and with or without sharding.
"""

import torch
from accelerate.utils import send_to_device

from ..utils.nested import pack
from .muon_exchange import share_muon


def is_fsdp(accelerator):
    return accelerator.distributed_type == "FSDP"


def is_deepspeed(accelerator):
    return accelerator.distributed_type == "DEEPSPEED"


def _is_dtensor(tensor):
    return isinstance(tensor, torch.distributed.tensor.DTensor)


# ---- build and prepare the model


def init_empty(make):
    """Return the model that make() builds, on the CPU, with uninitialized weights. FSDP2 later overwrites the weights
    with those of the main process. Until then, the weights take no memory on Linux."""
    with torch.device("meta"):
        model = make()
    model.to_empty(device="cpu")
    model.tie_weights()
    return model


def disable_zero3_init(accelerator):
    """Prevent transformers from sharding a model with ZeRO-3 while loading it; `prepare` shards the model later.
    If Accelerate's DeepSpeed plugin still had a `dschf`, transformers would shard every model that it loads."""
    if is_deepspeed(accelerator):
        accelerator.state.deepspeed_plugin.dschf = None


def prepare(accelerator, model, optimizer, *, batch_size, micro_steps, grad_clip):
    """Return accelerator.prepare(model, optimizer), with the settings that FSDP2 and DeepSpeed need. batch_size:
    sequences per micro-batch. micro_steps: micro-batches per step and process. grad_clip: 0 for no clipping."""
    if is_fsdp(accelerator):
        _configure_fsdp(accelerator)
    if not is_deepspeed(accelerator):
        model, optimizer = accelerator.prepare(model, optimizer)
        share_muon(accelerator, model, optimizer)
        return model, optimizer
    accelerator.state.deepspeed_plugin.deepspeed_config.update(
        train_micro_batch_size_per_gpu=batch_size, gradient_accumulation_steps=micro_steps, gradient_clipping=grad_clip
    )
    # DeepSpeed initializes its float32 copy from rounded weights, but a run must resume with the exact weights
    is_rounded = accelerator.mixed_precision != "no"
    weights = {name: p.detach().clone() for name, p in model.named_parameters()} if is_rounded else {}
    model, optimizer = accelerator.prepare(model, optimizer)
    parameters = dict(model.module.named_parameters())
    for name, value in weights.items():
        _set_deepspeed(parameters[name], value)
    return model, optimizer


def _configure_fsdp(accelerator):
    """Configure FSDP2 to reduce gradients in float32 and to compile each block separately."""
    plugin = accelerator.state.fsdp_plugin
    if plugin.mixed_precision_policy is not None:
        # Accelerate's policy would also round the loss, the rotary tables and the reduced gradients to half precision
        plugin.mixed_precision_policy = torch.distributed.fsdp.MixedPrecisionPolicy(
            param_dtype=plugin.mixed_precision_policy.param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    # reduce-scatter after every micro-batch; otherwise each process keeps full gradients between micro-batches
    accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
    # compiling the full model would wrap it in a module that owns all parameters outside of the blocks
    accelerator.state.dynamo_plugin.use_regional_compilation = True


# ---- during training


def as_float(norm):
    """Return the result of clip_grad_norm_ as a float; DeepSpeed returns a float, FSDP2 a DTensor."""
    return float(norm.full_tensor() if _is_dtensor(norm) else norm)


def reshard(model):
    """Free the full weights of the last layers, which FSDP2 keeps after an evaluation."""
    for module in model.modules():
        if isinstance(module, torch.distributed.fsdp.FSDPModule):
            module.reshard()


# ---- save


def full_state_dict(accelerator, model, copy=False):
    """Return the full weights as {name: tensor on the CPU} on the main process, and {} on the others.

    Tied weights appear once. Call it on all processes, with the unwrapped model. Parameters are gathered one by one, so
    no device stores all of them. copy: also copy tensors that are on the CPU already.
    """
    weights = {}
    for name, parameter in model.named_parameters():
        full = _full_tensor(parameter)
        if accelerator.is_main_process:
            weights[name] = full.detach().to("cpu", copy=copy)
    return weights


def shard_index(accelerator, model):
    """Return (index of this process's shard of the optimizer state, number of shards). The index is None if another
    process saves this shard."""
    parameter = next(model.parameters())
    if not _is_dtensor(parameter):
        return (0 if accelerator.is_main_process else None), 1
    mesh, index, num_shards = parameter.device_mesh, 0, 1
    for placement, coordinate, size in zip(parameter.placements, mesh.get_coordinate(), mesh.shape, strict=True):
        if placement.is_shard():
            index, num_shards = index * size + coordinate, num_shards * size
        elif coordinate > 0:  # hybrid sharding: this shard is a replica, which the first node saves
            index = None
            break
    return index, num_shards


def optimizer_shard(accelerator, model, optimizer, copy=False):
    """Return the part of the optimizer state that this process saves. All processes call it.

    Returns:
        (tensors, layout). tensors: {"PARAMETER/FIELD": tensor on the CPU}. layout: a dictionary of JSON values:
            "first_rows": {"PARAMETER/FIELD": index of the tensor's first row in the full tensor}; sharded tensors only.
            "other_shape": names of the tensors whose shape differs from the shape of their parameter.
            "values": {PARAMETER: [[FIELD, value], ...]} for fields that are not tensors, see utils/nested.py.
            "groups": see changed_values.
            "nested": names of the tensors in "values" and "groups".
            "strides": {"PARAMETER/FIELD": strides} of the tensors that are not contiguous, such as the transposed
                result of a QR decomposition.
        If another process saves this shard, `tensors` and all values of `layout` are empty.
    """
    index, _ = shard_index(accelerator, model)
    tensors, first_rows, other_shape, nested, values = {}, {}, [], [], {}
    if is_deepspeed(accelerator):
        _link_deepspeed(optimizer.optimizer)
    for name, parameter in model.named_parameters():
        if is_deepspeed(accelerator):
            fields = _deepspeed_state(parameter, optimizer.optimizer)  # gathered by all processes
        else:
            fields = optimizer.state.get(parameter, {})
        if index is None:
            continue
        for field, value in fields.items():
            if _is_dtensor(value):
                tensor = value.to_local()
                if not tensor.shape[0]:  # no row is left for this process, because there are fewer rows than processes
                    continue
                first_rows[f"{name}/{field}"] = _local_rows(parameter)[0]
                tensors[f"{name}/{field}"] = tensor
            elif index == 0:  # replicated on all processes, such as the step count
                found = {}
                plain = pack(value, f"{name}/{field}", found)
                if not isinstance(value, torch.Tensor):
                    values.setdefault(name, []).append([field, plain])
                    nested += found
                elif value.dim() and value.shape != getattr(parameter, "ds_shape", parameter.shape):
                    other_shape += found
                tensors |= found
    groups, found = changed_values(optimizer) if index == 0 else ([], {})
    tensors |= found
    nested += found
    tensors |= {key: tensors[key].clone() for key in nested}  # safetensors refuses tensors that share memory
    strides = {key: tensor.stride() for key, tensor in tensors.items() if _is_permuted(tensor)}
    tensors = {key: tensor.detach().contiguous().to("cpu", copy=copy) for key, tensor in tensors.items()}
    names = {"first_rows": first_rows, "other_shape": other_shape, "nested": nested, "strides": strides}
    return tensors, names | {"values": values, "groups": groups}


def _is_permuted(tensor):
    """Return whether a tensor is not contiguous, but has no gaps in memory, so that a copy has the same strides."""
    return not tensor.is_contiguous() and torch.empty_like(tensor).stride() == tensor.stride()


def changed_values(optimizer):
    """Return (changed, tensors): the entries of the parameter groups that the optimizer has changed since optim.by_name
    created the optimizer, such as a step count. The recipe sets the other entries. changed: {key: JSON value} per
    parameter group. tensors: {name: tensor} of the tensors in the changed entries, see utils/nested.py."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    changed, tensors = [], {}
    for i, (group, initial) in enumerate(
        zip(optimizer.param_groups, getattr(optimizer, "initial_groups", ()), strict=False)
    ):
        changed.append({})
        for key, value in group.items():
            is_new = key not in initial or isinstance(value, torch.Tensor) or value != initial[key]
            if is_new and key not in ("params", "lr"):
                changed[i][key] = pack(value, f"group.{i}/{key}", tensors)
    return changed, tensors


def _full_tensor(parameter):
    """Return a full parameter, gathered if it is sharded."""
    if _is_dtensor(parameter):
        return parameter.full_tensor()
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):  # DeepSpeed: return the float32 copy
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter)
    return parameter


# ---- restore


def restore_optimizer(accelerator, model, optimizer, fields, read, values, groups):
    """Load saved state into the optimizer of a prepared model.

    Args:
        fields: {parameter name: names of its saved tensors, such as "exp_avg"}.
        read: function (name, field, start, stop) -> rows start to stop - 1 of a saved tensor, or the saved scalar.
        values: {parameter name: {field: value}} for the fields that are not tensors.
        groups: for each parameter group, {key: value} to set in it, see changed_values.
    """
    if is_deepspeed(accelerator):
        return _restore_deepspeed(model, optimizer, fields, read)
    for group, changed in zip(optimizer.param_groups, groups, strict=False):
        group |= send_to_device(changed, group["params"][0].device)
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        start, stop = _local_rows(parameter)
        state = send_to_device(values.get(name, {}), parameter.device)
        for field in fields.get(name, ()):
            state[field] = _place(parameter, group_of[id(parameter)], field, read(name, field, start, stop))
        if state:
            optimizer.state[parameter] = state


def _place(parameter, group, field, local):
    """Return `local`, this process's rows of a state tensor, as the optimizer expects them: on the device of the
    parameter, and as a DTensor if the parameter is a DTensor."""
    if field == "step" and not (group.get("fused") or group.get("capturable")):
        return local  # torch's optimizers count steps on the CPU
    local = local.to(parameter.device)
    if not _is_dtensor(parameter) or not local.dim():
        return local
    layout = {"shape": parameter.shape, "stride": parameter.stride()}
    return torch.distributed.tensor.DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, run_check=False, **layout
    )


def _local_rows(parameter):
    """Return (start, stop) of the rows of a parameter that this process stores. A scalar counts as one row."""
    if _is_dtensor(parameter):
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        shape, offset = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        return offset[0], offset[0] + shape[0]
    return 0, parameter.shape[0] if parameter.dim() else 1


# ---- DeepSpeed: torch's optimizer updates a few flat vectors, which contain this process's part of each parameter


def _deepspeed_state(parameter, zero):
    """Return a parameter's optimizer state: {field: full tensor}. zero: DeepSpeed's wrapper of the torch optimizer."""
    from deepspeed.utils import safe_get_full_optimizer_state

    return {
        # scalars are step counts, equal for all parameters
        field: safe_get_full_optimizer_state(parameter, field) if value.dim() else value.clone()
        for field, value in next(iter(zero.optimizer.state.values()), {}).items()
    }


def _link_deepspeed(zero):
    """In ZeRO stages 1 and 2, link every parameter to the optimizer state of the flat vector that contains it.

    DeepSpeed links parameters only once, in the first step. At that time, only one flat vector has optimizer state, so
    the parameters in the other vectors are not linked.
    """
    if hasattr(zero, "single_partition_of_fp32_groups"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _restore_deepspeed(model, optimizer, fields, read):
    """Create DeepSpeed's optimizer state before the first step, and fill it with the saved state."""
    zero = optimizer.optimizer
    is_stage_3 = hasattr(zero, "fp32_partitioned_groups_flat")
    vectors = zero.fp32_partitioned_groups_flat if is_stage_3 else zero.single_partition_of_fp32_groups
    name = next(iter(fields))
    values = {field: read(name, field, 0, 1) for field in fields[name]}
    for vector in vectors:
        zero.optimizer.state[vector] = {
            field: torch.zeros_like(vector) if value.dim() else value.clone().to(vector.device)
            for field, value in values.items()
        }
    _link_deepspeed(zero)
    for name, parameter in model.named_parameters():
        shape = parameter.ds_shape if is_stage_3 else parameter.shape
        for field in (field for field, value in values.items() if value.dim()):
            _set_deepspeed(parameter, read(name, field, 0, shape[0]).to(parameter.device), field)


def _set_deepspeed(parameter, value, field=None):
    """Set a field of a parameter's optimizer state to `value`, a full tensor. If field is None, set the parameter's
    float32 copy."""
    if not hasattr(parameter, "ds_id"):  # stages 1 and 2
        return parameter.set_full_hp_param(value, field)
    part = parameter.ds_tensor.numel()  # all parts have the same size; the last one is padded
    padded = value.new_zeros(torch.distributed.get_world_size(), part)
    padded.view(-1)[: value.numel()] = value.flatten()
    parameter._z3_optimizer.set_local_hp_param(padded[torch.distributed.get_rank()], parameter, field)
