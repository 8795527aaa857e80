"""A trained detector behind HTTP: images in, detections out; and the page on which to look at them."""
