"""lram: offline-RL trajectories for 432 tasks, and the Large Recurrent Action Models trained on them."""

import os

# Threads of torch that wait must sleep: where cores are shared, spinning ones made training 10 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
