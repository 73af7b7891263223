"""The main job: word problems, with a reference model made on the spot. Some minutes on two CPU cores."""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.seed = 0
    # qsharp learns a guide; reinforce, ppo, dpo, rpo and klq train a copy of the reference (their sections are below).
    c.algorithm = "qsharp"
    c.rounds = 2
    c.mesh = "single"  # a preset's name in meshes.py: one device of any kind, or v5e_8, v5p_64, cuda_8, ...

    c.task = ConfigDict()
    c.task.name = "arithmetic"
    c.task.max_events = 3
    c.task.equation_fraction = 0.4  # share of pre-training texts that are bare equations
    c.task.error_scale = 1.0  # of the corpus's reading errors; 0 gives a clean corpus

    c.ref = "pretrain"  # made here, from the two sections below; or the folder of a model, as transformers keeps them
    c.guide = (
        "ref"  # starts from the reference's weights; scratch: of the shape below; or a folder, of a model or guide
    )
    c.dtype = config_dict.placeholder(str)  # float32 or bfloat16, of models in folders; None: each folder's own
    c.prompt_format = "plain"  # or chat, one turn in the chat template of the reference's folder

    c.model = ConfigDict()
    c.model.size = "tiny"

    c.pretrain = ConfigDict()  # pi_ref, by maximum likelihood on the task's texts
    c.pretrain.steps = 1600
    c.pretrain.stop_loss = 0.0  # nats a response token; stop early when reached
    c.pretrain.batch_size = 32
    c.pretrain.length_bucket = 24  # batches are padded to multiples of it, in tokens
    c.pretrain.log_every = 50
    c.pretrain.save_every = 400
    c.pretrain.optimizer = optimizer("muon", 0.02)
    c.pretrain.optimizer.adam_learning_rate = 4e-3  # Muon's AdamW, for all but the blocks' matrices

    c.value = ConfigDict()  # the guide's head
    c.value.type = "v"  # v: read at the appended token; q: a head over the vocabulary
    c.value.distribution = "bernoulli"  # or categorical, scalar
    c.value.atoms = ()  # rewards of the categorical's atoms

    c.generate = ConfigDict()
    c.generate.temperature = 1.0
    c.generate.top_p = 1.0
    c.generate.top_k = 0  # 0: no limit
    c.generate.top_k_candidates = 5  # tokens that the guide scores at each step
    c.generate.others = "mass"  # log-weight of the tokens that it does not score: mass, prefix, or zero
    c.generate.max_new_tokens = 56
    c.generate.prompt_bucket = 48  # prompts are padded to multiples of it, in tokens

    c.collect = ConfigDict()
    c.collect.prompts = 600  # new problems a round
    c.collect.samples = 4  # rollouts of each
    c.collect.eta = 0.1  # of the roll-in, from round 2 on
    c.collect.batch_size = 250  # rows that are decoded at once; one that ends is given to the next prompt
    c.collect.shard_rows = 1200
    c.collect.drop_no_variation = False  # fit to no problem whose rollouts of a round all have one reward

    c.fit = ConfigDict()
    c.fit.epochs = 5
    c.fit.batch_size = 32
    c.fit.accumulate = 1  # parts that a batch is taken in, for less memory; the step is the whole batch's
    c.fit.remat = "dots"  # kept for the gradient: matrix products; none: everything; full: the blocks' inputs alone
    c.fit.dtype = config_dict.placeholder(str)  # of the fit's products, float32 or bfloat16; None: the guide's own
    c.fit.attention = "xla"  # blocks: for long sequences on a CPU; cudnn: on CUDA, in bfloat16; splash: on TPUs
    c.fit.lora_rank = 0  # learn updates of the trunk's kernels of this rank, beside the head; 0: all weights
    c.fit.lora_alpha = 16.0  # over the rank, what those updates are multiplied by
    c.fit.length_bucket = 24
    c.fit.pack_length = 0  # tokens of a row that several rollouts share; 0: one a row, padded as the bucket says
    c.fit.holdout = 0.05  # share of prompts that the guide is measured on, not fitted to
    c.fit.evaluate_every = 0  # steps between measurements of the guide; 0: at the end alone
    c.fit.patience = 0  # measurements in a row without a better nll that end the fit, with the best guide; 0: off
    c.fit.projection = "two_hot"  # of rewards on a categorical's atoms, or nearest
    c.fit.clip_rewards = False
    c.fit.warm_start = True  # from the guide of the round before; the paper's start anew is False
    c.fit.future_offsets = 0  # later tokens that the auxiliary loss predicts; 0: off
    c.fit.future_weight = 1.0
    c.fit.log_every = 50
    c.fit.save_every = 250
    c.fit.optimizer = optimizer("muon", 0.02)
    c.fit.optimizer.adam_learning_rate = 4e-3

    c.cd = ConfigDict()
    c.cd.variant = "regression"  # of pi_ref's rewards; fudge: their likelihood, and a tilt by log p; q: Bellman targets

    c.vas = ConfigDict()
    c.vas.td_lambda = 0.95  # of the returns that values are fitted to; 1: the reward itself, 0: the next token's value

    # Of the methods that train the policy itself. From `fit` they take length_bucket, accumulate, remat, dtype,
    # attention and save_every. Where beta or tau is None, the KL's weight is collect.eta, as it is for the others.
    c.policy = ConfigDict()
    c.policy.batch_size = 64  # rollouts of a step, of dpo and rpo both of a pair; reinforce samples as many at a time
    c.policy.prompts = 64  # of ppo and klq, that the policy answers before it changes, each collect.samples times
    c.policy.log_prob_limit = 1e-4  # nats that sampler and trainer may differ by
    # Of ppo and klq: the value head's error changes the head alone. False: the trunk too, which the policy shares; in
    # KLQ 1 / tau times as much as the policy's own part of the gradient.
    c.policy.detach_values = True
    c.policy.optimizer = optimizer("adamw", 1e-3)

    c.reinforce = ConfigDict()
    c.reinforce.baseline = "leave_one_out"  # of the prompt's other samples, or mean, of all rollouts at hand
    c.reinforce.greedy = False  # the paper's variant: the likeliest tokens, one response a prompt

    c.ppo = ConfigDict()
    c.ppo.epochs = 4  # over each lot of rollouts
    c.ppo.clip = 0.2  # of the ratio to the policy that sampled
    c.ppo.gae_lambda = 0.95
    c.ppo.value_weight = 0.5  # of the value head's squared error

    c.klq = ConfigDict()
    c.klq.tau = config_dict.placeholder(float)
    c.klq.epochs = 4
    c.klq.return_lambda = 0.95
    c.klq.alpha = 1.0  # how far the targets go from the old action value to the lambda-return

    c.dpo = ConfigDict()
    c.dpo.beta = config_dict.placeholder(float)
    c.dpo.epochs = 4  # over all pairs

    c.rpo = ConfigDict()
    c.rpo.beta = config_dict.placeholder(float)
    c.rpo.alpha = 1.0  # of the chosen response's likelihood, a token
    c.rpo.epochs = 4

    c.evaluate = ConfigDict()
    c.evaluate.problems = 500
    c.evaluate.samples = 8  # of pi_ref for each problem: pass@k, majority of 8, best of 8
    c.evaluate.guided_samples = 1  # of what is learned, for each problem and eta; the paper has 8 for every method
    c.evaluate.pass_at = ()  # k of pass@k, none above samples; (): 1, 2, 4, ... up to the samples that there are
    c.evaluate.etas = (0.5, 0.2, 0.1, 0.05)
    c.evaluate.batch_size = 250
    return c


def optimizer(name: str, learning_rate: float) -> ConfigDict:
    c = ConfigDict()
    c.name = name  # adamw, adafactor (moments of rows and columns alone), or muon
    c.learning_rate = learning_rate  # at its peak
    c.adam_learning_rate = learning_rate
    c.weight_decay = 0.01
    c.b2 = 0.98  # of AdamW
    c.clip = 1.0  # global norm of the gradient
    c.warmup_steps = 50
    c.schedule = "cosine"
    c.end_fraction = 0.05  # of the peak, at the end
    return c
