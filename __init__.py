"""lram: offline-RL trajectories for 432 tasks, and the Large Recurrent Action Models trained on them."""
