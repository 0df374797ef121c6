#!/bin/bash
# diffusers 0.42.1: FlowMatchEulerDiscreteScheduler(shift=3) has other noise levels after set_timesteps(1000) than before.
#
# Guess: the scheduler is made with the levels of its 1,000 training steps, so set_timesteps(1000) gives these again.
# What happens: the ends of the range are those after the shift, and set_timesteps shifts what lies between them once
#   more. The lowest level is three times as high: who trains on the levels of the new scheduler, as training scripts
#   do, trains on some that no sampling comes to, and 1,000 steps of sampling end early.
# Seen: lowest 0.0030 when made, 0.0089 after set_timesteps(1000); with shift=1 the same, 0.0010.
. "$(dirname "$0")/lib.sh"
install torch==2.13.0 numpy==2.4.6 diffusers==0.42.1
run <<'P'
from diffusers import FlowMatchEulerDiscreteScheduler

seen = []
for shift in (3.0, 1.0):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    made = scheduler.sigmas[-1].item()
    scheduler.set_timesteps(1000)
    seen.append([round(made, 4), round(scheduler.sigmas[-2].item(), 4)])  # the last of all is 0
print(seen)
assert seen == [[0.003, 0.0089], [0.001, 0.001]], seen
P
