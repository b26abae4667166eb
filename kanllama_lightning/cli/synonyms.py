"""What other trainers call the options of this one."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches

TRAIN = {
    "model.optimizer.lr": "lr learning_rate learning-rate model.lr optimizer.lr peak_lr max_lr "
    "sae_lr lr_end",
    "model.optimizer.weight_decay": "weight_decay wd",
    "model.optimizer.betas": "betas adam_beta1 adam_beta2 beta1 beta2",
    "model.optimizer.eps": "eps adam_epsilon",
    "model.optimizer": "optim optimizer_name optimizer",
    "model.tokens": "tokens epochs num_epochs n_epochs num_train_epochs steps max_steps num_steps "
    "n_steps total_steps train_steps training_steps iterations iters max_iters max_epochs budget "
    "max_tokens n_tokens num_tokens total_tokens training_tokens total_training_tokens "
    "trainer.max_tokens data.tokens trainer.epochs trainer.steps model.steps model.epochs",
    "model.sae_batch_tokens": "batch_size batch bs train_batch_size sae_batch_size "
    "train_batch_size_tokens per_device_train_batch_size model.batch_size trainer.batch_size "
    "data.batch_size batch_tokens",
    "data.lm_batch_seqs": "lm_batch_size llm_batch_size store_batch_size_prompts "
    "store_batch_size model_batch_size",
    "data.workers": "num_workers workers dataloader_num_workers data.num_workers",
    "model.buffer.capacity_tokens": "buffer_size buffer n_batches_in_buffer shuffle_buffer",
    "model.clip_ratio": "clip grad_clip max_grad_norm clip_grad_norm gradient_clipping",
    "seed_everything": "seed random_seed manual_seed rng_seed random-seed trainer.seed",
    "runs_dir": "output_dir output-dir out_dir outdir save_dir checkpoint_dir log_dir logdir "
    "work_dir workdir checkpoints_dir results_dir output trainer.default_root",
    "run": "name run_name run-name exp_name experiment experiment_name run_dir folder out "
    "wandb_name",
    "ckpt_path": "resume resume_from resume_from_checkpoint checkpoint ckpt continue_from load "
    "from_checkpoint continue restore",
    "trainer.accelerator": "device cuda gpu cpu accelerator use_gpu",
    "trainer.devices": "gpus n_gpus num_gpus devices n_devices nproc world_size",
    "trainer.num_nodes": "nodes num_nodes",
    "trainer.precision": "precision fp16 bf16 amp mixed_precision autocast",
    "trainer.val_check_interval": "eval_steps eval_every val_every eval_interval val_interval "
    "evaluation_steps",
    "trainer.log_every_n_steps": "log_every logging_steps log_interval log_steps log_freq",
    "trainer.logger": "wandb use_wandb log_to_wandb report_to logger wandb_project no_wandb",
    "trainer.max_time": "time_limit max_hours walltime time",
    "lm.name": "model_name model_name_or_path model-name base_model llm model.name lm_name "
    "pretrained model_path language_model tokenizer",
    "lm.hook_point": "hook hook_name hook_point hookpoint hookpoints hook-point layer layers "
    "hook_layer hook_site site module submodule lm.layer model.layer lm.hook",
    "lm.dtype": "dtype torch_dtype model_dtype",
    "lm.revision": "revision lm.commit",
    "lm.bos": "bos prepend_bos",
    "data.train": "dataset dataset_path dataset_name data_path data_dir train_file text corpus "
    "train train_data data.path data.dataset data.text data.name data.file input",
    "data.val": "val val_data eval_dataset validation validation_file data.eval",
    "data.val_tokens": "eval_tokens n_eval_tokens val_tokens n_eval_samples",
    "data.val_fraction": "val_fraction val_split validation_split test_size val_size",
    "data.ctx_len": "ctx_len context_size context_length seq_len max_length block_size "
    "sequence_length max_seq_len ctx data.seq_len data.max_length",
    "data.cache": "cache cache_dir cached_activations_path",
    "model.head.target_l0": "k l0 target_l0 topk sparsity model.k model.l0 model.head.k "
    "model.head.l0 model.head.topk model.head.sparsity",
    "model.head.d_sae": "d_sae dict_size n_latents num_latents width latents d_hidden "
    "dictionary_size expansion expansion_factor num_features n_features model.d_sae "
    "model.head.n_latents model.head.dict_size model.head.expansion_factor model.head.width",
    "model.head.l1_coefficient": "l1 l1_coeff l1_coefficient l1_penalty sparsity_penalty",
    "model.head.alpha_aux": "auxk_alpha aux_alpha aux_coefficient alpha_aux",
    "model.head": "head sae sae_type architecture arch activation_fn model.head_type head_type "
    "model.type kind",
    "head_seed": "init_seed model_seed",
    "config": "cfg configs config_file yaml conf",
}
EVALUATE = {
    "runs_dir": "run_dir dir output_dir",
    "out": "output output_dir out_dir save_dir",
    "documents": "n_documents docs n n_docs samples limit num_samples max_documents",
    "text": "data dataset data.val data.train input prompt",
    "ctx_len": "context_length seq_len max_length context_size",
    "batch_seqs": "batch_size bs batch",
    "lm.name": "model model_name lm base_model llm",
    "lm.hook_point": "hook hook_point layer",
    "reports": "report only metrics tasks",
    "again": "force overwrite redo rerun",
    "dtype": "precision torch_dtype lm.dtype",
    "device": "cuda gpu accelerator cpu",
    "n_new": "max_new_tokens new_tokens length max_tokens",
    "steer": "steering intervene",
    "top": "top_k topk k",
    "force": "anyway",
    "tolerance": "tol",
}


def meant(name: str, known: Sequence[str], elsewhere: Mapping[str, str]) -> str | None:
    """The option that somebody is after who typed another name; None if none is near."""
    for option, names in elsewhere.items():
        if option in known and name.lower() in names.split():
            return option
    plain = name.replace("-", "_").lower()
    by_plain = {one.lower(): one for one in known}
    if plain in by_plain:
        return by_plain[plain]
    for option, names in elsewhere.items():
        if option in known and plain in names.split():
            return option
    last = {one.rpartition(".")[2]: one for one in reversed(known)}
    if "." not in plain and plain in last:
        return last[plain]
    near = get_close_matches(plain, list(by_plain), n=1, cutoff=0.7)
    if near:
        return by_plain[near[0]]
    near = get_close_matches(plain.rpartition(".")[2], list(last), n=1, cutoff=0.8)
    return last[near[0]] if near else None
