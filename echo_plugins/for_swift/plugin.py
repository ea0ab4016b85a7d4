"""The file given to ms-swift: `swift sft --external_plugins echo_plugins/for_swift/plugin.py ...`.

ms-swift imports it by its path; `echo_plugins` itself has to be installed or on PYTHONPATH.
"""

from echo_plugins.for_swift import template

template.register()
