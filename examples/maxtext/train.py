"""MaxText's trainer with its hyper-connections computed by jax_mhc; arguments are MaxText's own."""

import sys

import fused
from maxtext.trainers.pre_train import train

if __name__ == "__main__":
    fused.install()
    train.main(sys.argv)
