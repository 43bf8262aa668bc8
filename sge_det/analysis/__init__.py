"""What a trained model does and costs: FLOPs, time, detections, gates, and where they point."""
