"""The whole loop on a laptop: a 0.8M-parameter model learns to research an embedded web.

    python -m dr_jax.train --config=configs/quickstart.py --workdir=runs/quickstart

Hardware: 2 CPU cores, under 4 GiB of memory, no network, no key.
Expect: a held-out F1 (greedy) that rises from about 0.19 to about 0.76; docs/benchmarks.md has what was measured.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.steps = 24  # held-out F1 is flat after about 12

    config.questions = ConfigDict()
    config.questions.train = "world:train"
    config.questions.heldout = "world:heldout"  # shares no fact with the train split
    config.questions.world_count = 3000  # more than steps x questions: none is seen twice

    config.web = ConfigDict()
    config.web.provider = "world"  # the embedded site and search engine, on loopback
    config.web.key_variable = "SERPER_API_KEY"  # unused here: the embedded engine takes any key
    config.web.endpoint = ""  # the embedded engine's own, as is its address
    config.web.endpoint_address = ""
    config.web.wire = ConfigDict()  # for provider 'json', any other API
    config.web.region, config.web.language = "us", "en"
    config.web.max_concurrent_searches = 64
    config.web.max_searches_per_s = 0.0  # as fast as the provider allows; a plan may state a rate
    config.web.cache = ""  # a file in the workdir; 'redis://host:6379/0' where several hosts share it
    config.web.cache_mode = "record"
    config.web.cache_ttl_s = 7 * 24 * 3600.0  # the reference's 7 days
    config.web.workers = ""  # this host's own processes; 'host:6379' = machines of a Ray cluster
    config.web.contact = "https://example.com/contact"
    config.web.robots = True
    config.web.min_delay_s = 1.0  # other people's sites; the embedded one is our own, and exempt
    config.web.blocked_domains = ()
    config.web.reader = "extractive"
    config.web.segment_chars = 2000  # embedded pages are a few thousand characters long

    config.reading = ConfigDict()  # of web.reader 'policy' and 'endpoint'; the extractive one has no use for it
    config.reading.max_segments = 4
    config.reading.patience = 2
    config.reading.max_tokens = 96  # as a turn
    config.reading.train = False
    config.reading.endpoint = ""
    config.reading.endpoint_address = ""
    config.reading.model = ""
    config.reading.key_variable = ""
    config.reading.parameters = ConfigDict()
    config.reading.max_concurrent = 32

    config.budget = ConfigDict()
    config.budget.max_usd = 0.0  # no limit: the embedded engine is free
    config.budget.max_calls = 0
    config.budget.max_bytes = 0
    config.budget.max_step_usd = 0.0  # the same for one step
    config.budget.max_step_calls = 0
    config.budget.max_step_bytes = 0
    config.budget.prices = ConfigDict()

    config.agent = ConfigDict()
    config.agent.preset = "quickstart"  # the deepresearcher grammar with a short prompt
    config.agent.temperature = 1.0
    config.agent.top_p = 1.0
    config.agent.top_k = 0
    config.agent.deadline_s = 120.0  # all of a step's episodes together took 3 to 5 s

    config.rollout = ConfigDict()
    config.rollout.questions = 16
    config.rollout.rollouts = 8
    config.rollout.max_in_flight = 128  # all of them: each keeps a slot of its own
    config.rollout.max_memory_fraction = 0.8  # of the host's; above it no episode starts
    config.rollout.max_policy_lag = 0  # the reference's; 1 overlaps the update with rollouts, and needs grpo.tis_cap
    config.rollout.max_infra_fraction = 0.2

    config.engine = ConfigDict()
    config.engine.slots = 128
    config.engine.context = 2048
    config.engine.pages = 2048  # of 128 tokens: enough for all slots at full context
    config.engine.tensor = 1
    config.engine.prefill_rows = 8
    config.engine.prefill_chunk = 128
    config.engine.decode_steps = 8
    config.engine.attention = "blocks"  # 'ragged' is the TPU's kernel
    config.engine.compiler = ConfigDict()  # its own choice

    config.model = ConfigDict()
    config.model.path = "world"
    config.model.dtype = "float32"
    config.model.remat = "mlp"  # fastest on a CPU, where memory traffic is what costs
    config.model.attention = "blocks"  # 'flash' and 'splash' are kernels for TPUs
    config.model.compiler = ConfigDict()  # its own choice

    config.topology = ""  # whatever is there
    config.mesh = ConfigDict(dict(data=1, fsdp=1, tensor=1))
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
    config.batch.rows = 128  # questions x rollouts
    config.batch.row_tokens = 2048
    config.batch.shorter_rows = ()  # its rows are short
    config.batch.micro_rows = 1  # on a CPU the smallest is fastest
    config.batch.parts = 1  # a step is short, and one sum is the same in every run

    config.grpo = ConfigDict()
    config.grpo.advantage = "std"  # as the reference
    config.grpo.old_logp = "learner"  # one update per batch: the ratio is 1
    config.grpo.tis_cap = 0.0  # 2.0 where weights may lag
    config.grpo.equal_groups = "skip"  # about half of the groups, and the update is most of a step's time
    config.grpo.clip_low = 0.2
    config.grpo.clip_high = 0.2
    config.grpo.kl_coef = 0.0  # the reference has 0.001: a second forward pass, and here nothing to protect
    config.grpo.entropy_coef = 0.0

    config.optim = ConfigDict()
    config.optim.lr = 4e-4  # a 0.8M-parameter model; the 7B uses 1e-6
    config.optim.warmup_steps = 4
    config.optim.b1 = 0.9
    config.optim.b2 = 0.999
    config.optim.weight_decay = 0.0
    config.optim.grad_clip = 1.0
    config.optim.momentum_dtype = "float32"

    config.checkpoint = ConfigDict()
    config.checkpoint.every_steps = 12
    config.checkpoint.keep = 2

    config.eval = ConfigDict()
    config.eval.every_steps = 12
    config.eval.questions = 200

    config.export = ConfigDict()
    config.export.dtype = "float32"
    config.export.max_shard_gb = 5.0
    return config
