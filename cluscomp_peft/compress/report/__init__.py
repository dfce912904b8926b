"""What a compression tells about itself: the report in JSON, the page with plots, the model card."""
