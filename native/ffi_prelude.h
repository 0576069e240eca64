/* What the generated binding includes before the declarations of lmkv.h. */
#include <stddef.h>
#include <stdint.h>
#include "lmkv.h"
