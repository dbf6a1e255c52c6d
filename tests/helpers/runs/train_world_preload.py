"""What the fork server of ``train_world`` imports once for all ranks; nothing here may start a thread."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed  # noqa: F401
import peft  # noqa: F401
import transformers  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

from can_dist.training import engine  # noqa: F401
