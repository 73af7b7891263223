"""Pre-training of the reference model: maximum likelihood of a task's responses, given their prompts.

For small tasks, in place of a downloaded model.
"""

import contextlib
import functools

from qsharp_jax import train
from qsharp_jax.data.batches import Batches, Example
from qsharp_jax.models import attention, decoder, quantized
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.run import models, sources
from qsharp_jax.run.problems import task
from qsharp_jax.run.session import Session
from qsharp_jax.system.files import folder_of_this_machine
from qsharp_jax.train.checkpoint import Checkpoints, DamagedError


def run(session: Session) -> LanguageModel:
    """Train pi_ref on fresh texts, each seen once, into the workdir; a finished one, or a folder's, is loaded."""
    if sources.folder(session.config, "ref"):
        return models.load_ref(session)
    config, model_config = session.config.pretrain, models.ref_config(session)
    checkpoints = Checkpoints(session.workdir.ref)
    with contextlib.suppress(DamagedError):  # `fit` reports it, and resumes from the checkpoint before
        if checkpoints.finished():
            return models.load_ref(session)
    text = models.tokenizer(session)
    if session.workdir.writes:
        with folder_of_this_machine(session.workdir.ref / "tokenizer") as folder:
            text.hf_tokenizer.save_pretrained(folder)
    texts = task(session).pretraining_texts(
        session.config.task, config.steps * config.batch_size, session.seed("pretraining texts")
    )
    examples = [Example(text.encode_prompt(prompt), text.encode_response(response)) for prompt, response in texts]
    batches = Batches(
        examples,
        rows=config.batch_size,
        bucket=config.length_bucket,
        seed=session.seed("pretrain"),
    )
    save_unit = config.log_every if config.stop_loss else 1  # resumed, `stop` is to average over the same steps
    optimizer = train.make_optimizer(config.optimizer)
    initial = session.for_fitting(LanguageModel(decoder.init(session.key("ref"), model_config), model_config))
    with session.fitting(model_config.dtype):
        state = train.fit(
            train.init_state(initial.params, optimizer),
            batches,
            loss_fn=functools.partial(
                train.language_model_loss,
                config=model_config,
                attend_by="blocks" if max(map(len, examples)) > attention.CHUNK else "xla",
            ),
            optimizer=optimizer,
            schedule=train.make_schedule(config.optimizer, config.steps),
            checkpoints=checkpoints,
            loop=train.Loop(
                name="pre-train pi_ref",
                total_steps=min(config.steps, batches.steps_per_epoch),
                log_every=config.log_every,
                save_every=config.save_every,
                save_unit=save_unit,
                stop_requested=functools.partial(train.told_to_stop, every=max(save_unit, train.AGREE_EVERY)),
                log=session.workdir.append_metrics,
                stop=lambda means: means["loss"] <= config.stop_loss,
                flops=train.language_model_flops(model_config),
                profile=session.profile_folder("pretrain"),
            ),
        )
    return session.for_decoding(quantized.model(initial.replace(params=state.params)))
