# What the headers include, for this project and for those that find it installed.
include(CMakeFindDependencyMacro)
find_dependency(Threads)
find_dependency(Boost 1.70)
find_path(MSGPACK_CXX_INCLUDE_DIR msgpack.hpp)
if(NOT MSGPACK_CXX_INCLUDE_DIR)
  message(FATAL_ERROR "msgpack.hpp is missing: install libmsgpack-cxx-dev")
endif()
