"""Flags of diffusers' own training scripts, and of launchers, that this trainer spells otherwise or does not have."""

ALIASES = {  # the same meaning under another name
    "alpha_mask": "masked_loss",
    "caption_dropout": "proportion_empty_prompts",
    "ddpm_num_inference_steps": "validation_num_inference_steps",
    "ema_max_decay": "ema_decay",
    "instance_data_dir": "train_data_dir",
    "log_steps": "logging_steps",
    "logger": "report_to",
    "lora_rank": "rank",
    "lora_target_modules": "lora_layers",
    "lr": "learning_rate",
    "max_train_epochs": "num_train_epochs",
    "network_weights": "pretrained_lora_model_name_or_path",
    "non_ema_revision": "revision",
    "num_epochs": "num_train_epochs",
    "num_repeats": "repeats",
    "num_workers": "dataloader_num_workers",
    "pre_compute_text_embeddings": "cache_text_embeddings",
    "pretrained_vae_name_or_path": "pretrained_vae_model_name_or_path",
    "tokenizer_max_length": "max_sequence_length",
    "vae_path": "pretrained_vae_model_name_or_path",
    "validation_prompt": "validation_prompts",
}

_INSTEAD = {  # what to do in the place of several flags
    "--optimizer is adamw, also with --use_8bit_adam, muon or prodigy; its weight decay is --adam_weight_decay.": (
        "use_adafactor weight_decay"
    ),
    "--optimizer prodigy has what is their default in diffusers' scripts.": (
        "prodigy_beta3 prodigy_decouple prodigy_use_bias_correction prodigy_safeguard_warmup"
    ),
    "captions come with the data, a column or a .txt beside each image; --instance_prompt is for those without.": (
        "instance_prompts concepts_list"
    ),
    "pictures of the class are generated one by one, in the precision of --mixed_precision; --class_data_dir may "
    "hold real ones.": "prior_generation_precision sample_batch_size real_prior",
    "--train_text_encoder trains a LoRA of text encoders to the end, with the transformer's weight decay.": (
        "train_text_encoder_frac adam_weight_decay_text_encoder skip_save_text_encoder fsdp_text_encoder"
    ),
    "captions are encoded as the stock pipeline does; --cache_text_embeddings does it once.": (
        "text_encoder_use_attention_mask text_encoder_out_layers remote_text_encoder complex_human_instruction "
        "clip_skip"
    ),
    "no new tokens are learned; --rank trains a LoRA on captions.": (
        "train_text_encoder_ti train_text_encoder_ti_frac token_abstraction num_new_tokens_per_abstraction "
        "placeholder_token initializer_token learnable_property num_vectors modifier_token"
    ),
    "--timestep_sampling chooses the density of the timesteps (uniform, logit_normal, mode); losses have no "
    "other weight, but for --precondition_outputs, and --snr_gamma of --objective ddpm.": (
        "weighting_scheme do_edm_style_training timestep_bias_strategy "
        "timestep_bias_multiplier timestep_bias_begin timestep_bias_end timestep_bias_portion"
    ),
    "the loss is the squared error of the prediction.": (
        "loss_type huber_c huber_schedule dream_training dream_detail_preservation"
    ),
    "the noise is Gaussian, and nothing is added to it.": "input_perturbation noise_offset offset_noise",
    "--objective says what is predicted; the noise schedule is the pipeline's own.": (
        "prediction_type rescale_betas_zero_snr ddpm_beta_schedule ddpm_num_steps validation_scheduler"
    ),
    "--latents_cache FOLDER keeps the latents, for later runs too.": "cache_latents cache_latents_to_disk",
    "latents are sampled anew from the posterior in every step.": "vae_encode_mode",
    "latents are encoded in the batches that train; --latents_cache keeps them.": (
        "vae_encode_batch_size encode_batch_size"
    ),
    "--validation_steps N validates every N steps; the end is always validated.": (
        "validation_epochs save_images_epochs"
    ),
    "--checkpointing_steps N saves every N steps; the end is always saved.": (
        "save_steps save_model_epochs save_every_n_epochs"
    ),
    "sample grids are of labels, or of --validation_prompts.": "validation_image validation_images",
    "there is no conditioning on images: a class conditions, or with --text_conditioning a caption.": (
        "conditioning_image_column cond_image_column original_image_column edited_image_column edit_prompt_column"
        " controlnet_model_name_or_path conditioning_dropout_prob"
    ),
    "--validation_prompts are generated at the end too; --num_validation_images 0 generates none.": (
        "final_validation_prompt skip_final_inference"
    ),
    "--num_validation_images is the number of pictures in a sample grid.": "eval_batch_size",
    "this is always so here; leave it out.": (
        "foreach_ema set_grads_to_none streaming save_model_card save_as_full_pipeline class_labels_conditioning"
    ),
    "the EMA has one constant --ema_decay from the first step on.": "ema_inv_gamma ema_power",
    "images are shrunk by box filters and bicubic, as ADM does.": "image_interpolation_mode interpolation_type",
    "--center_crop crops the centre, else a random square is cut.": "crops_coords_top_left_h crops_coords_top_left_w",
    "--random_flip flips images at random.": "hflip",
    "--resolution is the side of a square; --aspect_ratio_buckets takes other shapes.": "height width",
    "--aspect_ratio_buckets auto takes the usual ratios.": "use_aspect_ratio_buckets enable_bucket",
    "attention is torch's own, or --enable_xformers_memory_efficient_attention.": (
        "enable_npu_flash_attention use_npu_flash_attention enable_flash_attention_2 xformers sdpa"
    ),
    "weights train, and are saved, in float32; the rest follows --mixed_precision.": (
        "upcast_before_saving upcast_vae vae_precision weight_dtype save_weight_dtype"
    ),
    "--mixed_precision is no, fp16 or bf16.": "do_fp8_training fp16 bf16",
    "--base_precision quantises the base of a LoRA (nf4 or int8); it takes no file.": "bnb_quantization_config_path",
    "--cache_text_embeddings and --latents_cache keep text encoders and VAE out of the step; --offload_ema "
    "the EMA.": "offload enable_model_cpu_offload lowvram",
    "--lora_layers names the layers.": "lora_blocks lora_unet_blocks",
    "--adapter dora trains a DoRA.": "use_dora",
    "--adapter chooses among lora, dora, lokr and loha.": "use_blora use_lora_bias gaussian_init_lora network_module",
    "a LoRA is written as diffusers loads it; --lora_format comfyui adds a file for ComfyUI.": "output_kohya_format",
    "--rank N trains a LoRA through peft.": "use_peft use_lora network_dim",
    "tokenizers are the pipeline's own.": "tokenizer_name",
    "--model names a preset, or is `custom`.": "model_config_name_or_path",
    "--dataset_name or --train_data_dir take it, with a column of captions.": (
        "data_df_path jsonl_for_train train_shards_path_or_url load_from_disk instance_data_root"
    ),
    "the project of trackers is `vaerepa`; metrics lie in --output_dir.": (
        "tracker_project_name tracker_name wandb_entity wandb_project"
    ),
    "--train_batch_size counts images per device, --global_batch_size over all of them.": "batch_size",
    "give another --output_dir, or go on with --resume_from_checkpoint latest.": "overwrite_output_dir",
    "leave --push_to_hub out.": "no_hub",
    "log in with `hf auth login`, or set HF_TOKEN.": "use_auth_token token",
    "a teacher is --alignment_teacher, of --alignment self.": "pretrained_teacher_model",
    "processes and devices belong to the launcher: accelerate launch --help, before the script's name.": (
        "local_rank num_processes num_machines multi_gpu cpu gpu_ids machine_rank main_process_ip "
        "main_process_port same_network dynamo_backend use_fsdp use_deepspeed deepspeed "
        "num_cpu_threads_per_process nproc_per_node nnodes node_rank master_addr master_port standalone "
        "rdzv_backend rdzv_endpoint rdzv_id"
    ),
    "the launcher's own is given before the script's name; options of the run are --config FILE.": "config_file",
}
FOREIGN = {name: sentence for sentence, names in _INSTEAD.items() for name in names.split()}
