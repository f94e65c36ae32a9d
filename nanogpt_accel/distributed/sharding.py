"""What differs where weights and optimizer state lie in pieces on several processes: FSDP2 (torch's fully_shard) and
DeepSpeed's ZeRO.

A checkpoint is the same for all of them. Its weights are whole, and the optimizer's state is found by parameter, field
and row, so a run goes on with another number of processes, sharded or not.

    reshard(model)
    weights = whole_weights(accelerator, model)                           # for the main process
    tensors, first_rows = optimizer_piece(accelerator, model, optimizer)  # what this process holds
    restore_optimizer(accelerator, model, optimizer, fields, read)        # the same, whoever holds it now
"""

import torch


def is_fsdp(accelerator):
    return accelerator.distributed_type == "FSDP"


def is_deepspeed(accelerator):
    return accelerator.distributed_type == "DEEPSPEED"


def init_empty(make):
    """The model that make() builds, with room for its weights but none in it: on Linux it takes no memory until it is
    written to. FSDP2 fills it with the main process's weights, so only that one has to read or draw them."""
    with torch.device("meta"):
        model = make()
    model.to_empty(device="cpu")
    model.tie_weights()
    return model


def disable_zero3_init(accelerator):
    """Keep transformers from taking every model that it loads to pieces as under ZeRO-3, as it does while this object
    lives; `prepare` takes the one that is trained."""
    if is_deepspeed(accelerator):
        accelerator.state.deepspeed_plugin.dschf = None


def prepare(accelerator, model, optimizer, *, batch_size, micro_steps, grad_clip):
    """accelerator.prepare(model, optimizer), and around it what FSDP2 and DeepSpeed have to be told.

    batch_size: sequences of a micro-batch. micro_steps: micro-batches of a step on each process. grad_clip: 0 for none.
    """
    if is_fsdp(accelerator):
        _configure_fsdp(accelerator)
    if not is_deepspeed(accelerator):
        return accelerator.prepare(model, optimizer)
    accelerator.state.deepspeed_plugin.deepspeed_config.update(
        train_micro_batch_size_per_gpu=batch_size, gradient_accumulation_steps=micro_steps, gradient_clipping=grad_clip
    )
    weights = {}
    if accelerator.mixed_precision != "no":
        # it makes its copy in float32 of rounded weights; a run has to go on with the exact ones
        weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model, optimizer = accelerator.prepare(model, optimizer)
    for name, parameter in model.module.named_parameters():
        if name in weights:
            _set_deepspeed(parameter, weights[name])
    return model, optimizer


def _configure_fsdp(accelerator):
    """Let FSDP2 sum in float32, and compile each block by itself."""
    plugin = accelerator.state.fsdp_plugin
    if plugin.mixed_precision_policy is not None:
        # Accelerate's would round the loss, the rotary tables, and what the processes exchange to half precision too
        low = plugin.mixed_precision_policy.param_dtype
        plugin.mixed_precision_policy = torch.distributed.fsdp.MixedPrecisionPolicy(
            param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    # the gradients of every micro-batch go to their shards at once: between them each process would keep whole ones
    accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
    # the model compiled as a whole is a module around it, which then holds what no block does, out of our reach
    accelerator.state.dynamo_plugin.use_regional_compilation = True


def as_float(norm):
    """What clip_grad_norm_ returns, as a float: DeepSpeed has one already, FSDP2 has it in pieces."""
    if isinstance(norm, torch.distributed.tensor.DTensor):
        norm = norm.full_tensor()
    return float(norm)


def reshard(model):
    """Let FSDP2 put the gathered weights of an evaluation away, which it keeps of the last layers: until then they
    stand in the place of the parameters."""
    for module in model.modules():
        if isinstance(module, torch.distributed.fsdp.FSDPModule):
            module.reshard()


def full_state_dict(accelerator, model, copy=False):
    """{name: tensor on the CPU} of a model's weights, tied ones once; empty on all processes but the main one.

    Every process has to call it. Parameters are gathered one by one, so no device holds all of them.

    model: unwrapped. copy: even where a tensor lies on the CPU already.
    """
    weights = {}
    for name, parameter in model.named_parameters():
        whole = _full_tensor(parameter)
        if accelerator.is_main_process:
            weights[name] = whole.detach().to("cpu", copy=copy)
    return weights


def shard_index(accelerator, model):
    """(number of this process's piece of the optimizer's state, number of pieces); None for a process that holds
    nothing which another does not hold as well."""
    parameter = next(model.parameters())
    if not isinstance(parameter, torch.distributed.tensor.DTensor):
        return (0 if accelerator.is_main_process else None), 1
    mesh, number, pieces = parameter.device_mesh, 0, 1
    for placement, place, size in zip(parameter.placements, mesh.get_coordinate(), mesh.shape, strict=True):
        if placement.is_shard():
            number, pieces = number * size + place, pieces * size
        elif place > 0:  # (hybrid sharding: another node's copy)
            number = None
            break
    return number, pieces


def optimizer_shard(accelerator, model, optimizer, copy=False):
    """What this process is to save of the optimizer's state; every process has to call it.

    Returns:
        (tensors, first_rows): {"PARAMETER/FIELD": tensor on the CPU}, and for those that are some rows of a whole one
        {"PARAMETER/FIELD": number of the first row}. Both empty where piece_number is None.
    """
    number, _ = shard_index(accelerator, model)
    tensors, first_rows = {}, {}
    for name, parameter, fields in _states(accelerator, model, optimizer):
        if number is None:
            continue
        for field, tensor in fields.items():
            if isinstance(tensor, torch.distributed.tensor.DTensor):
                start, _ = _local_rows(parameter)
                tensor = tensor.to_local()
                if not tensor.shape[0]:  # fewer rows than processes
                    continue
                first_rows[f"{name}/{field}"] = start
            elif number > 0:
                continue  # the same on all, such as the count of steps
            tensors[f"{name}/{field}"] = tensor.detach().contiguous().to("cpu", copy=copy)
    return tensors, first_rows


def restore_optimizer(accelerator, model, optimizer, fields, read):
    """Put saved state into the optimizer of a prepared model.

    fields: the names of the saved fields of each parameter, by its name.
    read: (name, field, first row, row after the last) -> tensor; the rows do not matter for a scalar.
    """
    if is_deepspeed(accelerator):
        return _restore_deepspeed(model, optimizer, fields, read)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    index_of = {id(parameter): i for i, parameter in enumerate(parameters)}
    state = {}
    for name, parameter in model.named_parameters():
        start, stop = _local_rows(parameter)
        values = {field: read(name, field, start, stop) for field in fields.get(name, ())}
        if values:
            state[index_of[id(parameter)]] = {field: _to_sharded(parameter, value) for field, value in values.items()}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _full_tensor(parameter):
    """All of a parameter, gathered where it lies in pieces."""
    if isinstance(parameter, torch.distributed.tensor.DTensor):
        return parameter.full_tensor()
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):  # DeepSpeed's: its copy in float32
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter)
    return parameter


def _local_rows(parameter):
    """(first row, row after the last) of a parameter that lie on this process; a scalar has one row."""
    if isinstance(parameter, torch.distributed.tensor.DTensor):
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        shape, offset = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        return offset[0], offset[0] + shape[0]
    return 0, parameter.shape[0] if parameter.dim() else 1


def _to_sharded(parameter, local):
    """A tensor of this process's rows, as a piece of a whole one where the parameter is."""
    if not isinstance(parameter, torch.distributed.tensor.DTensor) or not local.dim():
        return local
    return torch.distributed.tensor.DTensor.from_local(
        local.to(parameter.device),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _states(accelerator, model, optimizer):
    """(name, parameter, {field: tensor}) of each parameter that has state, in the order of the model."""
    if is_deepspeed(accelerator):
        _link_deepspeed(optimizer.optimizer)
    for name, parameter in model.named_parameters():
        if is_deepspeed(accelerator):
            fields = _deepspeed_state(parameter, optimizer.optimizer)
        else:
            fields = optimizer.state.get(parameter, {})
        if fields:
            yield name, parameter, fields


# DeepSpeed's optimizer steps torch's on a few long vectors, each a process's part of many parameters in a row


def _deepspeed_state(parameter, zero):
    """{field: whole tensor} of a parameter. zero: DeepSpeed's optimizer, whose own `optimizer` is torch's."""
    from deepspeed.utils import safe_get_full_optimizer_state

    fields = next(iter(zero.optimizer.state.values()), {})
    # what counts steps is the same for all
    return {
        field: safe_get_full_optimizer_state(parameter, field) if value.dim() else value.clone()
        for field, value in fields.items()
    }


def _link_deepspeed(zero):
    """Let stages 1 and 2 know the state of every vector: their first step does it too early for all but one."""
    if hasattr(zero, "single_partition_of_fp32_groups"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _restore_deepspeed(model, optimizer, fields, read):
    """Fill the vectors' state, which DeepSpeed makes with the first step, before it."""
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
    """Set one field of a parameter's state, or without a field its copy in float32; each process keeps its part."""
    if not hasattr(parameter, "ds_id"):  # stages 1 and 2
        return parameter.set_full_hp_param(value, field)
    part = parameter.ds_tensor.numel()  # padded, so that all processes have as much
    padded = value.new_zeros(part * torch.distributed.get_world_size())
    padded[: value.numel()] = value.flatten()
    start = part * torch.distributed.get_rank()
    parameter._z3_optimizer.set_local_hp_param(padded[start : start + part], parameter, field)
