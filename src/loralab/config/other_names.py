"""What other programs call a setting that has another name here.

Owns these names alone: of PEFT, transformers' `TrainingArguments`, TRL, Axolotl, LLaMA-Factory and Unsloth. They are no
aliases: a configuration with one is refused, and told the key that is meant.
"""

# Of each key, by its last part or the whole of it, the key here.
OTHER_NAMES = {
    name: key
    for key, names in {
        "model.name": "base_model model_id model_name model_name_or_path pretrained_model_name_or_path",
        "model.revision": "model_revision",
        "model.precision": "bf16 fp16 dtype torch_dtype bnb_4bit_compute_dtype",
        "model.quantization": "load_in_4bit load_in_8bit quantization_bit bnb_4bit_quant_type",
        "model.double_quantization": "bnb_4bit_use_double_quant double_quant",
        "model.attn_implementation": "attn_impl flash_attn flash_attention use_flash_attention_2",
        "model.device": "use_cpu no_cuda",
        "data.train": "dataset datasets dataset_name data_path train_file train_data",
        "data.validation": "val_set_size val_size validation_file eval_dataset eval_file valid",
        "data.template": "chat_template prompt_template",
        "data.train_on": "train_on_inputs completion_only_loss assistant_only_loss mask_history",
        "data.max_length": "cutoff_len sequence_len max_seq_length max_seq_len model_max_length block_size",
        "data.num_workers": "preprocessing_num_workers dataset_num_proc dataloader_num_workers",
        "lora.r": "rank lora_r lora_rank",
        "lora.alpha": "lora_alpha",
        "lora.dropout": "lora_dropout",
        "lora.variant": "use_dora use_rslora init_lora_weights pissa_init peft_use_dora peft_use_rslora",
        "lora.target_modules": "lora_target lora_target_modules lora_target_linear",
        "lora.modules_to_save": "lora_modules_to_save additional_target",
        "lora.layers_to_transform": "peft_layers_to_transform lora_layers",
        "training.num_train_epochs": "epochs num_epochs n_epochs max_epochs",
        "training.per_device_train_batch_size": "batch_size micro_batch_size train_batch_size per_device_batch_size",
        "training.gradient_accumulation_steps": "gradient_accumulation grad_accum accumulation_steps",
        "training.learning_rate": "lr",
        "training.lr_scheduler_type": "lr_scheduler scheduler",
        "training.optim": "optimizer",
        "training.warmup_ratio": "warmup",
        "training.max_grad_norm": "gradient_clipping clip_grad max_norm",
        "training.layout": "packing sample_packing padding_free group_by_length multipack",
        "training.distributed": "fsdp fsdp_config deepspeed",
        "training.early_stopping.patience": "early_stopping_patience",
        "training.early_stopping.mode": "greater_is_better",
        "evaluation.strategy": "eval_strategy evaluation_strategy",
        "evaluation.steps": "eval_steps",
        "evaluation.batch_size": "per_device_eval_batch_size eval_batch_size",
        "output.dir": "output_dir out_dir save_dir",
        "output.trackers": "report_to",
        "output.hub.repo": "hub_model_id push_to_hub",
        "output.hub.private": "hub_private_repo",
        "output.hub.strategy": "hub_strategy",
    }.items()
    for name in names.split()
}
