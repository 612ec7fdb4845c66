"""From a policy and prompts to trajectories.

`engine` decodes whole batches on the device, `agent` runs episodes with tools,
`tools` lists what may be called. This room imports the
core only; it meets `models` and `pipelines` through `paravt_jax.interfaces`.
"""
