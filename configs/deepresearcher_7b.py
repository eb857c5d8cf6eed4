"""The paper's recipe: Qwen2.5-7B-Instruct learns to research the live web.

    SERPER_API_KEY=... python -m dr_jax.train --config=configs/deepresearcher_7b.py --workdir=/data/runs/7b \
        --config.model.path=/data/Qwen2.5-7B-Instruct --config.questions.train=train.parquet \
        --config.questions.heldout=dev.parquet

Hardware: a v5p-8, one host of 4 chips; `deepresearcher_7b_*.py` are the same recipe on pods, and `tools/plan.py` says
what each of them needs. None has been run at this scale: the numbers of the recipe are those of the reference's
training script; sizes of the engine and of the mesh are a starting point.
Expect, from the paper (its figure 4): mean dev F1 from about 0.37 to about 0.54 in 34 steps.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 1  # of the question order, as the reference
    config.steps = 312  # one epoch of 80,000 questions; the paper plots about 34

    config.questions = ConfigDict()
    config.questions.train = "train.parquet"  # NQ : TQ : HotpotQA : 2Wiki = 1 : 1 : 3 : 3
    config.questions.heldout = "dev.parquet"  # 125 questions of each of 7 data sets
    config.questions.world_count = 0  # not the embedded world

    config.web = ConfigDict()
    config.web.provider = "serper"
    config.web.key_variable = "SERPER_API_KEY"
    config.web.endpoint = ""  # Serper's own
    config.web.endpoint_address = ""
    config.web.wire = ConfigDict()  # for provider 'json', any other API
    config.web.region, config.web.language = "us", "en"
    config.web.max_concurrent_searches = 64  # Serper's packages allow 50 to 300 queries a second
    config.web.max_searches_per_s = 0.0  # as fast as the provider allows; a plan may state a rate
    config.web.cache = ""  # a file in the workdir; 'redis://host:6379/0' where several hosts share it
    config.web.cache_mode = "live"
    config.web.cache_ttl_s = 7 * 24 * 3600.0  # the reference's 7 days
    config.web.workers = ""  # this host's own processes; 'host:6379' = machines of a Ray cluster
    config.web.contact = ""  # yours: site owners must be able to reach whoever fetches
    config.web.robots = True
    config.web.min_delay_s = 1.0  # what many a robots.txt asks for
    config.web.blocked_domains = ("huggingface.co", "kaggle.com")  # print benchmark questions with their answers
    config.web.reader = "extractive"  # the reference pays a language model to read: 'endpoint', or, for free, 'policy'
    config.web.segment_chars = 4000  # about 1,000 tokens

    config.reading = ConfigDict()  # of web.reader 'policy' and 'endpoint'
    config.reading.max_segments = 8  # of one page: 32,000 characters; the reference knows no limit
    config.reading.patience = 3
    config.reading.max_tokens = 512  # of one answer
    config.reading.train = False  # as in the reference, whose reader is another model
    config.reading.endpoint = ""  # 'https://dashscope.aliyuncs.com/compatible-mode/v1' for the reference's qwen-plus
    config.reading.endpoint_address = ""
    config.reading.model = ""
    config.reading.key_variable = ""
    config.reading.parameters = ConfigDict()
    config.reading.max_concurrent = 64

    config.budget = ConfigDict()
    config.budget.max_usd = 500.0  # stops the run there; the start prints what it can cost at most
    config.budget.max_calls = 0
    config.budget.max_bytes = 0
    config.budget.max_step_usd = 0.0  # the same for one step
    config.budget.max_step_calls = 0
    config.budget.max_step_bytes = 0
    # {"serper": 0.0003} for its largest package; an endpoint that reads needs "reader_input" and "reader_output", US
    # dollars per million tokens
    config.budget.prices = ConfigDict()

    config.agent = ConfigDict()
    config.agent.preset = "deepresearcher"
    config.agent.temperature = 1.0
    config.agent.top_p = 1.0
    config.agent.top_k = 0
    config.agent.deadline_s = 1800.0  # 10 turns of generation and up to 9 of the web

    config.rollout = ConfigDict()
    config.rollout.questions = 256
    config.rollout.rollouts = 16
    config.rollout.max_in_flight = 1024  # several times the slots: a rollout that waits for the web holds none
    config.rollout.max_memory_fraction = 0.8  # of the host's; above it no episode starts
    config.rollout.max_policy_lag = 0  # the reference's; 1 overlaps the update with rollouts, and needs grpo.tis_cap
    config.rollout.max_infra_fraction = 0.2

    config.engine = ConfigDict()
    config.engine.slots = 16
    config.engine.context = 32768  # what Qwen2.5 was trained for
    config.engine.pages = 4096  # of 128 tokens, 57,344 bytes each in bf16: 28 GiB over the host's chips
    config.engine.tensor = 4  # the most that 4 kv heads allow
    config.engine.prefill_rows = 4
    config.engine.prefill_chunk = 1024
    config.engine.decode_steps = 16
    config.engine.attention = "ragged"  # the TPU's kernel; 'blocks' runs anywhere
    config.engine.compiler = ConfigDict(
        dict(xla_tpu_scoped_vmem_limit_kib=32768)  # on-chip memory of a product: larger pieces; a v4 has 16 MiB
    )

    config.model = ConfigDict()
    config.model.path = "Qwen2.5-7B-Instruct"  # a local directory
    config.model.dtype = "bfloat16"  # the optimizer keeps f32 beside it
    config.model.remat = "attention"  # 14 KiB a token and layer: 12 GiB for a row; its kernel does not run twice
    config.model.attention = "flash"  # a kernel for TPUs with room for a row's keys; 'blocks' runs anywhere
    config.model.compiler = ConfigDict(
        dict(  # docs/benchmarks.md has what each changes in the plan
            xla_jf_spmd_threshold_for_windowed_einsum_mib=1_000_000,  # products whole, not cut into a loop over a ring
            xla_tpu_enable_async_collective_fusion=True,  # weights are gathered beside products
            xla_tpu_enable_async_collective_fusion_fuse_all_gather=True,
            xla_tpu_enable_async_collective_fusion_multiple_steps=True,
            xla_tpu_scoped_vmem_limit_kib=49152,  # on-chip memory of a product: fewer, larger pieces; a v4 has 16 MiB
        )
    )

    config.topology = "v5p:2x2x1"  # one host of 4 chips, sold as v5p-8; '' = whatever is there
    config.mesh = ConfigDict(dict(data=1, fsdp=4, tensor=1))
    #                       weights    activations
    config.sharding = ConfigDict(
        dict(
            b=(None, ("data", "fsdp")),
            t=(None, None),
            s=(None, None),
            d=("fsdp", None),
            f=("tensor", "tensor"),
            n=("tensor", "tensor"),
            k=("tensor", "tensor"),
            g=(None, None),
            h=(None, None),
            l=(None, None),
            v=("tensor", "tensor"),
        )
    )

    config.batch = ConfigDict()
    config.batch.rows = 4096  # questions x rollouts: an episode always fits
    config.batch.row_tokens = 32768
    config.batch.shorter_rows = ()  # rows of one length are filled best (docs/benchmarks.md, Rollouts)
    config.batch.micro_rows = 4  # one row a chip
    config.batch.parts = 1  # as the reference; with max_policy_lag 2, 16 keep the chips busy (docs/benchmarks.md)

    config.grpo = ConfigDict()
    config.grpo.advantage = "std"
    config.grpo.old_logp = "learner"  # one update per batch: the ratio is 1
    config.grpo.tis_cap = 0.0  # 2.0 where weights may lag
    config.grpo.equal_groups = "keep"  # as the reference; they still carry the KL and the entropy term
    config.grpo.clip_low = 0.2
    config.grpo.clip_high = 0.2
    config.grpo.kl_coef = 0.001
    config.grpo.entropy_coef = 0.001

    config.optim = ConfigDict()
    config.optim.lr = 1e-6
    config.optim.warmup_steps = 0
    config.optim.b1 = 0.9
    config.optim.b2 = 0.999
    config.optim.weight_decay = 0.01
    config.optim.grad_clip = 1.0
    config.optim.momentum_dtype = "float32"

    config.checkpoint = ConfigDict()
    config.checkpoint.every_steps = 1
    config.checkpoint.keep = 3  # about 85 GiB each: f32 parameters and both moments

    config.eval = ConfigDict()
    config.eval.every_steps = 10
    config.eval.questions = 875

    config.export = ConfigDict()
    config.export.dtype = "bfloat16"
    config.export.max_shard_gb = 5.0
    return config
