"""train.py with a NaN in a picture of one rank, at update 9 (counted from 0).

python planted_nan.py RANK [FLAG ...]
"""

import sys

import numpy as np

import data
import train

planted_rank, flags = int(sys.argv[1]), sys.argv[2:]
stream = data.batches


def planted(*args):
    for step, batch in enumerate(stream(*args)):
        if step == 9 and data.ranks()[0] == planted_rank:
            batch.x[-1] = np.nan
        yield batch


data.batches = planted
data.command(lambda: train.main(flags))
