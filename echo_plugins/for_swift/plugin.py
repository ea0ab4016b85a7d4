"""The file given to ms-swift: `swift sft --external_plugins echo_plugins/for_swift/plugin.py ...`.

ms-swift imports it by its path; `echo_plugins` itself has to be installed or on PYTHONPATH.
"""

from echo_plugins.end_with_client import end_with_parent
from echo_plugins.for_swift import template

# torchrun starts each worker in a session of its own, so that a killed run would leave them training.
end_with_parent()
template.register()
