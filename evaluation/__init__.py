"""COCO's metrics of results, and the report of an evaluation."""
