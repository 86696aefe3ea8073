import os

os.environ["HF_HUB_OFFLINE"] = "1"      # no test may wait for a network
os.environ["CUDA_VISIBLE_DEVICES"] = ""   # the numbers are a CPU's
os.environ["OMP_NUM_THREADS"] = "1"     # the models are tiny: a second thread only gets in the way of the simulators

import torch

torch.set_num_threads(1)
