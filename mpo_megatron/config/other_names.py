"""What other trainers (PEFT, TRL, transformers, verl, Megatron-LM, LLaMA-Factory) call our options."""

from __future__ import annotations

OTHER_NAMES: dict[str, str] = {
    # command:option → the others' names
    "train:model.checkpoint": "model_name_or_path model_name model_path base_model pretrained_model_name_or_path load pretrained",
    "train:model.reference": "ref_model ref_model_name_or_path ref_model_path reference_model",
    "train:model.precision": "bf16 fp16 dtype torch_dtype",
    "train:model.recompute": "gradient_checkpointing activation_checkpointing recompute_granularity",
    "train:model.attention": "attn_implementation flash_attn use_flash_attention_2 attention_backend",
    "train:data.train": "train_files train_file train_dataset train_data data_path",
    "train:data.eval": "val_files eval_dataset validation_file val_dataset eval_data",
    "train:data.groups_per_step": "per_device_train_batch_size train_batch_size global_batch_size batch_size ppo_mini_batch_size",
    "train:data.row_tokens": "micro_batch_size ppo_micro_batch_size_per_gpu ppo_max_token_len_per_gpu max_tokens_per_gpu "
    "gradient_accumulation_steps",
    "train:data.shuffle": "shuffle_dataset",
    "train:parallel.tensor": "tensor_model_parallel_size tensor_parallel_size tp tp_size",
    "train:parallel.pipeline": "pipeline_model_parallel_size pipeline_parallel_size pp pp_size",
    "train:parallel.virtual_pipeline": "virtual_pipeline_model_parallel_size num_layers_per_virtual_pipeline_stage",
    "train:parallel.context": "context_parallel_size cp cp_size ulysses_sequence_parallel_size",
    "train:parallel.expert": "expert_model_parallel_size expert_parallel_size ep ep_size",
    "train:parallel.expert_tensor": "expert_tensor_parallel_size etp",
    "train:parallel.sequence": "sequence_parallel",
    "train:lora.rank": "r lora_r lora_rank",
    "train:lora.alpha": "lora_alpha",
    "train:lora.rslora": "use_rslora",
    "train:lora.target_modules": "lora_target lora_target_modules",
    "train:lora.quantize": "load_in_4bit bnb_4bit_quant_type quantization_bit",
    "train:loss.name": "loss_type pref_loss policy_loss",
    "train:loss.params.beta": "beta pref_beta",
    "train:loss.params.gamma": "gamma simpo_gamma",
    "train:loss.params.label_smoothing": "label_smoothing",
    "train:loss.params.sft_weight": "cpo_alpha rpo_alpha sft_loss_coef",
    "train:experts.balance_coeff": "router_aux_loss_coef moe_aux_loss_coeff",
    "train:experts.z_coeff": "router_z_loss_coef moe_z_loss_coeff",
    "train:optimizer.lr": "learning_rate max_lr peak_lr",
    "train:optimizer.min_lr": "lr_min min_learning_rate",
    "train:optimizer.schedule": "lr_scheduler_type lr_scheduler lr_decay_style",
    "train:optimizer.warmup_fraction": "warmup_ratio lr_warmup_ratio lr_warmup_fraction lr_warmup_steps_ratio warmup_steps "
    "lr_warmup_steps num_warmup_steps lr_warmup_iters",
    "train:optimizer.beta1": "adam_beta1",
    "train:optimizer.beta2": "adam_beta2",
    "train:optimizer.eps": "adam_epsilon adam_eps",
    "train:optimizer.clip_grad": "max_grad_norm gradient_clipping grad_clip",
    "train:checkpoint.every": "save_steps save_freq save_interval",
    "train:checkpoint.keep": "save_total_limit max_actor_ckpt_to_keep",
    "train:checkpoint.keep_best": "load_best_model_at_end",
    "train:checkpoint.best_metric": "metric_for_best_model",
    "train:checkpoint.best_is": "greater_is_better",
    "train:checkpoint.asynchronous": "async_save",
    "train:checkpoint.resume": "resume_from_checkpoint resume_mode",
    "train:logging.seconds_between_lines": "logging_steps log_interval",
    "train:logging.tensorboard": "report_to logger",
    "train:logging.wandb_project": "project_name",
    "train:logging.wandb_run": "run_name experiment_name wandb_exp_name",
    "train:epochs": "num_train_epochs num_epochs total_epochs max_epochs",
    "train:max_steps": "total_training_steps train_iters max_train_steps",
    "train:eval_every": "eval_steps test_freq eval_interval eval_strategy evaluation_strategy",
    "train:seed": "random_seed data_seed",
    "train:output": "output_dir save_dir default_local_dir save",
    "prepare:max_prompt_tokens": "max_prompt_length max_length max_seq_length max_seq_len seq_length cutoff_len",
    "prepare:max_response_tokens": "max_response_length max_completion_length max_length max_seq_length max_seq_len seq_length "
    "cutoff_len",
    "prepare:input": "dataset dataset_name dataset_path",
    "prepare:tokenizer": "tokenizer_name_or_path tokenizer_path tokenizer_name",
    "prepare:chat_template": "template",
    "prepare:held_out": "test_size val_size",
    "prepare:max_rows": "max_samples",
    "prepare:num_workers": "num_proc dataset_num_proc preprocessing_num_workers",
    "generate:num_responses": "n num_generations num_return_sequences n_samples_per_prompt",
    "generate:max_tokens": "max_new_tokens response_length",
    "generate:vllm.memory_fraction": "gpu_memory_utilization vllm_gpu_memory_utilization",
    "generate:vllm.tensor_parallel": "tensor_parallel_size vllm_tensor_parallel_size tensor_model_parallel_size",
}
ABSENT: dict[str, str] = {
    "lora_dropout": "adapters train without dropout",
    "bias": "adapters have no biases",
    "modules_to_save": "only linear layers have adapters",
    "init_lora_weights": "B starts at zero, A at random",
    "task_type": "adapters train a causal language model",
    "packing": "groups are always packed into rows",
    "padding_free": "groups are always packed into rows",
    "deepspeed": "Megatron-Core partitions model and optimizer (section parallel)",
    "fsdp": "Megatron-Core partitions model and optimizer (section parallel)",
    "remove_unused_columns": "`mpo prepare` lists unused columns",
    **dict.fromkeys(
        ("actor_rollout_ref", "algorithm", "trainer", "critic"),
        "it is a section of another trainer; write its options in ours, which `mpo train --help-all` lists",
    ),
}
"""Names of others without a counterpart, and why."""

_OURS: dict[str, list[str]] = {}
for _ours, _theirs in OTHER_NAMES.items():
    for _name in _theirs.split():
        _OURS.setdefault(_name, []).append(_ours)


def counterparts(name: str) -> list[str]:
    """Our options, as command:option, that another trainer calls so; empty if none does."""
    return _OURS.get(name.lower().replace("-", "_"), [])


def why_absent(name: str) -> str | None:
    """Why there is no such option, for names of other trainers."""
    return ABSENT.get(name.lower().replace("-", "_"))
