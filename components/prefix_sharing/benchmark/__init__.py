"""What ``prefix_dpo_benchmark`` times: steps in several formats, the parts of a layer, growing Rows and data sets."""
