"""The reward functions of `rewards.py` under TRL. It needs `pip install trl`, and nothing of this package.

    python examples/trl_reward/grpo.py MODEL
"""

import sys
from pathlib import Path

import torch
from datasets import load_dataset
from rewards import brief, on_topic
from trl import GRPOConfig, GRPOTrainer

HERE = Path(__file__).parent
GPU = torch.cuda.is_available()

trainer = GRPOTrainer(
    model=sys.argv[1],
    reward_funcs=[brief, on_topic],
    train_dataset=load_dataset("json", data_files=str(HERE / "prompts.jsonl"), split="train"),
    args=GRPOConfig(
        output_dir="runs/trl_reward_grpo",
        max_steps=3,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=16,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=GPU,
        use_cpu=not GPU,
    ),
)
trainer.train()
for row in trainer.state.log_history[:-1]:  # the last sums up the run
    print({name: row[name] for name in row if "reward" in name or name == "on_topic"})
