"""From graph and algorithm to what kernels take: the plan, fusion, the layout of images."""
