"""The engine: one loop a device that paints with any pipeline. Here are the public names only; the room's plan:

engine      the public face
job         a request as its owner sees it
shared      ``generate``: one engine a process
loading     puts a model together
loop        the thread: admit, group, pick, step, tell, decode
admission   from a job to a request under way: its model, its plan, its adapters
planning    a plan with all that the engine adds to it
caches      step caches of requests
adapters    LoRAs of requests
fetching    LoRAs come, beside the loop's work
standing    who outranks whom, by priorities and deadlines: pure functions
scheduler   among equals, who begins and who steps next: pure functions
accounts    what was used, and how long it takes
flight      what is in the air: models, requests, pictures, groups
inbox       what callers ask of the loop
results     a finished picture's record
failures    exceptions become our errors
device      the little that is asked of a device
"""

from gesso.engine.engine import Engine
from gesso.engine.job import Job
from gesso.engine.shared import generate

__all__ = ["Engine", "Job", "generate"]
