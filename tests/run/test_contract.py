"""What a stage promises: check, then begin, then swap; only one's own files; inputs like keys; what is kept."""

import importlib.util
import json
import os
import pathlib
import shutil

import numpy as np
import pytest
from conftest import ROOT, call, read

from nvit_jax import UserError
from nvit_jax.run import runner
from nvit_jax.run.agenda import agenda
from nvit_jax.run.config import STAGES
from nvit_jax.run.recipes import *  # noqa: F403
from nvit_jax.run.workdir import STOP, StageDir, recover
