"""COCO metrics of detections."""
