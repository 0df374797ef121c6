"""What a run tells while it trains: step statistics, metrics log, trackers, sample images, summary."""
